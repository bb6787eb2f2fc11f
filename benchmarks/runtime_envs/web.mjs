// Run in headless Chromium: transformers.js writes text from a directory, onnxruntime-web runs files.
//   node web.mjs NAME JOB.json, the job as for node.mjs; CHROMIUM names the browser.
import fs from 'node:fs';
import http from 'node:http';
import path from 'node:path';
import { createRequire } from 'node:module';
import { pathToFileURL } from 'node:url';

const require = createRequire(path.join(process.cwd(), 'package.json'));
const puppeteer = (await import(pathToFileURL(require.resolve('puppeteer-core')))).default;
const MIME = { '.html': 'text/html', '.js': 'text/javascript', '.mjs': 'text/javascript',
  '.wasm': 'application/wasm', '.json': 'application/json' };
const [what, job] = process.argv.slice(2);
const jobs = JSON.parse(fs.readFileSync(job));
const mounts = { '/modules/': path.join(process.cwd(), 'node_modules') };
const PAGE = `<!doctype html><script type="importmap">{"imports": {
  "onnxruntime-web/webgpu": "/modules/onnxruntime-web/dist/ort.webgpu.bundle.min.mjs",
  "onnxruntime-web": "/modules/onnxruntime-web/dist/ort.bundle.min.mjs",
  "onnxruntime-common": "/modules/onnxruntime-common/dist/esm/index.js"}}</script>`;

const server = http.createServer((ask, answer) => {
  const name = decodeURIComponent(new URL(ask.url, 'http://x').pathname);
  if (name === '/') { answer.setHeader('Content-Type', 'text/html'); return answer.end(PAGE); }
  const [from, to] = Object.entries(mounts).find(([m]) => name.startsWith(m)) ?? [];
  const file = to && path.join(to, name.slice(from.length));
  if (!file || !fs.existsSync(file)) { answer.statusCode = 404; return answer.end(); }
  answer.setHeader('Content-Type', MIME[path.extname(file)] ?? 'application/octet-stream');
  answer.end(fs.readFileSync(file));
}).listen(0);
const base = `http://localhost:${server.address().port}`;
const browser = await puppeteer.launch({ executablePath: process.env.CHROMIUM ?? '/usr/bin/chromium',
  args: ['--no-sandbox'], protocolTimeout: 500000 });

async function write(ids, count, name) {
  const hf = await import('/modules/@huggingface/transformers/dist/transformers.web.js');
  hf.env.allowRemoteModels = false;
  hf.env.allowLocalModels = true;
  hf.env.useBrowserCache = false;
  hf.env.localModelPath = '/models/';
  hf.env.backends.onnx.wasm.wasmPaths = '/modules/onnxruntime-web/dist/';
  hf.env.backends.onnx.wasm.numThreads = 1;
  const model = await hf.AutoModelForCausalLM.from_pretrained(name, { device: 'wasm' });
  const row = (f) => new hf.Tensor('int64', BigInt64Array.from(ids.map(f)), [1, ids.length]);
  const out = await model.generate({ input_ids: row(BigInt), attention_mask: row(() => 1n),
    max_new_tokens: count, min_new_tokens: count, do_sample: false, eos_token_id: null });
  return Array.from(out.data, Number).slice(ids.length);
}

// A session of a file stays in its page; the errors at each set of inputs come back.
async function open(which) {
  const ort = await import('/modules/onnxruntime-web/dist/ort.wasm.bundle.min.mjs');
  ort.env.wasm.wasmPaths = '/modules/onnxruntime-web/dist/';
  ort.env.wasm.numThreads = 1;
  const kinds = { float32: Float32Array, int64: BigInt64Array, bool: Uint8Array };
  const found = async (name) => {
    const answer = await fetch(`/models/${name}.json`);
    return answer.ok ? answer.json() : null;
  };
  const sets = await found(which + '_inputs') ?? await found('inputs');
  const wants = await found(which + '_outputs');
  const session = await ort.InferenceSession.create(`/models/${which}.onnx`);
  const errors = [];
  for (const [i, set] of sets.entries()) {
    const feed = {};
    for (const [key, a] of Object.entries(set)) {
      const data = a.type === 'int64' ? a.data.map(BigInt) : a.data;
      feed[key] = new ort.Tensor(a.type, kinds[a.type].from(data), a.shape);
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
    errors.push(worst);
    globalThis.again = async (times) => { for (let t = 0; t < times; t++) await session.run(feed); };
  }
  return errors;
}

// CPU time pruned : dense of the pages' main threads, in turn; the median
async function ratio(pages) {
  const spent = async (page) => {
    const client = pages[page].client ??= await pages[page].createCDPSession();
    await client.send('Performance.enable', { timeDomain: 'threadTicks' });
    const read = async () => (await client.send('Performance.getMetrics')).metrics
      .find((m) => m.name === 'ThreadTime' || m.name === 'TaskDuration').value;
    const start = await read();
    await pages[page].evaluate((times) => globalThis.again(times), 5);
    return (await read()) - start;
  };
  const found = [];
  for (let turn = 0; turn < 12; turn++) { // the first five let WebAssembly be compiled
    const dense = await spent('dense'), pruned = await spent('pruned');
    if (turn > 4) found.push(pruned / dense);
  }
  return found.sort((a, b) => a - b)[3];
}

async function text(page, folder, which) {
  const { ids, tokens } = JSON.parse(fs.readFileSync(path.join(folder, which + '_text.json')));
  const made = await page.evaluate(write, ids, tokens.length, which + '_js');
  return { same: made.filter((t, i) => t === tokens[i]).length, tokens: tokens.length };
}

for (const [artifact, folder] of Object.entries(jobs)) {
  const said = { artifact }, pages = {};
  mounts['/models/'] = folder;
  for (const which of ['dense', 'pruned']) {
    const page = pages[which] = await browser.newPage();
    try {
      await page.goto(base);
      said[which] = what === 'transformers.js' ? await text(page, folder, which)
        : await page.evaluate(open, which);
    } catch (problem) { said[which] = String(problem).split('\n')[0].slice(0, 160); }
  }
  if (Array.isArray(said.dense) && Array.isArray(said.pruned)) said.ratio = await ratio(pages);
  for (const page of Object.values(pages)) await page.close();
  console.log('ROW ' + JSON.stringify(said));
}
await browser.close();
process.exit(0);
