// Run in Node: transformers.js writes text from a directory, onnxruntime-node and -web run files.
//   node node.mjs NAME JOB.json, the job as for inside.py; one line of JSON an artifact.
import fs from 'node:fs';
import path from 'node:path';
import { createRequire } from 'node:module';
import { pathToFileURL } from 'node:url';

const require = createRequire(path.join(process.cwd(), 'package.json'));
const bring = async (name) => import(pathToFileURL(require.resolve(name)));
const [name, job] = process.argv.slice(2);
const KINDS = { float32: Float32Array, int64: BigInt64Array, bool: Uint8Array };

// arrays as JSON: [{name: {type, shape, data}}], one entry a set of inputs
const read = (folder, what) => JSON.parse(fs.readFileSync(path.join(folder, what + '.json')));

// CPU time pruned : dense, in turn; the median
async function ratio(runs) {
  const found = [];
  for (let turn = 0; turn < 12; turn++) { // the first five let WebAssembly be compiled
    const spent = {};
    for (const which of ['dense', 'pruned']) {
      const start = process.cpuUsage();
      await runs[which]();
      const { user, system } = process.cpuUsage(start);
      spent[which] = user + system;
    }
    if (turn > 4) found.push(spent.pruned / spent.dense);
  }
  return found.sort((a, b) => a - b)[3];
}

async function files(ort) {
  if (ort.env.wasm) ort.env.wasm.numThreads = 1;
  return async (folder) => {
    const said = {}, runs = {};
    for (const which of ['dense', 'pruned']) {
      try {
        const session = await ort.InferenceSession.create(
          ort.env && name === 'onnxruntime-web' ? fs.readFileSync(path.join(folder, which + '.onnx'))
            : path.join(folder, which + '.onnx'), { intraOpNumThreads: 1 });
        const wants = read(folder, which + '_outputs');
        said[which] = [];
        const own = fs.existsSync(path.join(folder, which + '_inputs.json'));
        for (const [i, set] of read(folder, own ? which + '_inputs' : 'inputs').entries()) {
          const feed = {};
          for (const [key, a] of Object.entries(set)) {
            const data = a.type === 'int64' ? a.data.map(BigInt) : a.data;
            feed[key] = new ort.Tensor(a.type, KINDS[a.type].from(data), a.shape);
          }
          const got = await session.run(feed);
          let worst = 0;
          for (const [k, want] of Object.values(wants[i]).entries()) {
            const have = got[session.outputNames[k]].data;
            let top = 1e-30, gap = 0;
            for (let j = 0; j < want.data.length; j++) {
              top = Math.max(top, Math.abs(want.data[j]));
              gap = Math.max(gap, Math.abs(want.data[j] - Number(have[j])));
            }
            worst = Math.max(worst, gap / top);
          }
          said[which].push(worst);
          runs[which] = () => session.run(feed);
        }
      } catch (problem) { said[which] = String(problem).split('\n')[0].slice(0, 160); }
    }
    if (Array.isArray(said.dense) && Array.isArray(said.pruned)) said.ratio = await ratio(runs);
    return said;
  };
}

async function text() {
  const { AutoModelForCausalLM, Tensor, env } = await bring('@huggingface/transformers');
  env.allowRemoteModels = false;
  return async (folder) => {
    const said = {};
    for (const which of ['dense', 'pruned']) {
      try {
        const place = path.join(folder, which + '_js');
        env.localModelPath = folder + '/';
        const { ids, tokens } = JSON.parse(fs.readFileSync(path.join(folder, which + '_text.json')));
        const model = await AutoModelForCausalLM.from_pretrained(path.basename(place));
        const row = (f) => new Tensor('int64', BigInt64Array.from(ids.map(f)), [1, ids.length]);
        const out = await model.generate({
          input_ids: row(BigInt), attention_mask: row(() => 1n), max_new_tokens: tokens.length,
          min_new_tokens: tokens.length, do_sample: false, eos_token_id: null });
        const made = Array.from(out.data, Number).slice(ids.length);
        said[which] = { same: made.filter((t, i) => t === tokens[i]).length, tokens: tokens.length };
      } catch (problem) { said[which] = String(problem).split('\n')[0].slice(0, 160); }
    }
    return said;
  };
}

const RUN = {
  'onnxruntime-node': async () => files(await bring('onnxruntime-node')),
  'onnxruntime-web': async () => files(await bring('onnxruntime-web')),
  'transformers.js': text,
};
const one = await RUN[name]();
for (const [artifact, folder] of Object.entries(JSON.parse(fs.readFileSync(job)))) {
  console.log('ROW ' + JSON.stringify({ artifact, ...await one(folder) }));
}
process.exit(0);
