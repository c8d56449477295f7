// Many small models in one process, on ONNX Runtime's WebAssembly build: what tools/arm64/infer.py does in Python.
//   EDGEQAT_WASM=<where install.sh put it> node tools/wasm/infer.mjs FOLDER
import { readFileSync, writeFileSync } from 'node:fs';
import { createRequire } from 'node:module';
import { join } from 'node:path';

const require = createRequire(join(process.env.EDGEQAT_WASM, 'node_modules', 'from-here.js'));
const ort = require('onnxruntime-web');
ort.env.wasm.numThreads = 1;
ort.env.logLevel = 'error';

const ARRAYS = { uint8: Uint8Array, int8: Int8Array, float32: Float32Array };

function tensor(folder, given) {
  const bytes = readFileSync(join(folder, given.file));
  const buffer = bytes.buffer.slice(bytes.byteOffset, bytes.byteOffset + bytes.byteLength);
  return new ort.Tensor(given.type, new ARRAYS[given.type](buffer), given.shape);
}

async function infer(folder, entry) {
  const entries = {};
  for (const [key, value] of Object.entries(entry.options)) {
    entries[key.replace('session.', '')] = value;
  }
  const session = await ort.InferenceSession.create(readFileSync(join(folder, entry.model)), {
    executionProviders: ['wasm'],
    graphOptimizationLevel: entry.level,
    extra: { session: entries },
  });
  const feeds = {};
  for (const [name, given] of Object.entries(entry.inputs)) {
    feeds[name] = tensor(folder, given);
  }
  const results = await session.run(feeds);
  for (const [name, file] of Object.entries(entry.outputs)) {
    const data = results[name].data;
    writeFileSync(join(folder, file), new Uint8Array(data.buffer, data.byteOffset, data.byteLength));
  }
  await session.release();
}

const folder = process.argv[2];
for (const entry of JSON.parse(readFileSync(join(folder, 'manifest.json'), 'utf8'))) {
  await infer(folder, entry);
}
console.log(ort.env.versions.web);
