// Run in headless Chromium: transformers.js (its onnxruntime-web) writes text from a directory.
//   node web.mjs transformers.js JOB.json, the job as for node.mjs; CHROMIUM names the browser.
import fs from 'node:fs';
import http from 'node:http';
import path from 'node:path';
import { createRequire } from 'node:module';
import { pathToFileURL } from 'node:url';

const require = createRequire(path.join(process.cwd(), 'package.json'));
const puppeteer = (await import(pathToFileURL(require.resolve('puppeteer-core')))).default;
const MIME = { '.html': 'text/html', '.js': 'text/javascript', '.mjs': 'text/javascript',
  '.wasm': 'application/wasm', '.json': 'application/json' };
const jobs = JSON.parse(fs.readFileSync(process.argv[3]));
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

for (const [artifact, folder] of Object.entries(jobs)) {
  const said = { artifact };
  mounts['/models/'] = folder;
  for (const which of ['dense', 'pruned']) {
    const page = await browser.newPage();
    try {
      const { ids, tokens } = JSON.parse(fs.readFileSync(path.join(folder, which + '_text.json')));
      await page.goto(base);
      const made = await page.evaluate(write, ids, tokens.length, which + '_js');
      said[which] = { same: made.filter((t, i) => t === tokens[i]).length, tokens: tokens.length };
    } catch (problem) { said[which] = String(problem).split('\n')[0].slice(0, 160); }
    await page.close();
  }
  console.log('ROW ' + JSON.stringify(said));
}
await browser.close();
process.exit(0);
