// What check.py does, on ONNX Runtime's WebAssembly build in Node:  npm install onnxruntime-web && node check.mjs [FOLDER]
//   --codes OUT   folder to write the computed codes into
// EDGEQAT_WASM names the folder whose node_modules holds onnxruntime-web, where that is not here.
import { createHash } from 'node:crypto';
import { appendFileSync, existsSync, mkdirSync, readFileSync, rmSync } from 'node:fs';
import { createRequire } from 'node:module';
import { dirname, join, resolve } from 'node:path';
import { fileURLToPath } from 'node:url';

const FORMAT = 1;
const here = dirname(fileURLToPath(import.meta.url));

function fail(message) {
  console.error(`error: ${message}`);
  process.exit(2);
}

function readExpected(bundle) {
  const path = join(bundle, 'expected.json');
  if (!existsSync(path)) fail(`${path}: no such file; name the folder that \`qat bundle\` wrote`);
  const expected = JSON.parse(readFileSync(path, 'utf8'));
  if (expected.format !== FORMAT) fail(`${path}: format ${expected.format} is not ${FORMAT}, which this script reads`);
  if (expected.needs_kernels) fail('a file of target ort-native needs kernels that do not run on WebAssembly');
  return expected;
}

function changedFiles(bundle, expected) {
  return [expected.model, expected.images]
    .filter((entry) => sha256(readFileSync(join(bundle, entry.file))) !== entry.sha256)
    .map((entry) => `  changed   ${entry.file} is not the file that was bundled`);
}

function sha256(bytes) {
  return createHash('sha256').update(bytes).digest('hex');
}

function bytesOf(data) {
  return new Uint8Array(data.buffer, data.byteOffset, data.byteLength);
}

async function run(bundle, expected, take) {
  const require = createRequire(join(resolve(process.env.EDGEQAT_WASM ?? here), 'node_modules', 'from-here.js'));
  const ort = require('onnxruntime-web');
  ort.env.wasm.numThreads = 1;
  ort.env.logLevel = 'error';
  const session = await ort.InferenceSession.create(readFileSync(join(bundle, expected.model.file)), {
    executionProviders: ['wasm'],
  });
  const raw = readFileSync(join(bundle, expected.images.file));
  const images = new Float32Array(raw.buffer.slice(raw.byteOffset, raw.byteOffset + raw.byteLength));
  const [count, ...shape] = expected.images.shape;
  const size = shape.reduce((a, b) => a * b);
  for (let i = 0; i < count; ++i) {
    const image = new ort.Tensor('float32', images.slice(i * size, (i + 1) * size), [1, ...shape]);
    take(await session.run({ [expected.input]: image }));
  }
  return ort.env.versions.web;
}

function verdict(expected, digests, logits) {
  const images = logits.length;
  const differing = new Set();
  const wrong = [], inFloat = [], after = [];
  for (const tensor of expected.tensors) {
    const count = tensor.sha256.filter((digest, i) => digest !== digests[tensor.name][i]).length;
    if (!count) continue;
    const follows = tensor.sources.some((source) => differing.has(source));
    differing.add(tensor.name);
    const text = `${tensor.name} (computed by ${tensor.made_by}) on ${count} of ${images} images`;
    if (follows) after.push(text);
    else if (tensor.float) inFloat.push(text);
    else wrong.push(text);
  }
  const lines = [`  codes     ${expected.tensors.length - differing.size} of ${expected.tensors.length} tensors are as expected on ${images} images`];
  lines.push(...wrong.map((text) => `  WRONG     ${text}`));
  lines.push(...inFloat.map((text) => `  float     ${text}: floating point, which may differ in the last bit`));
  if (after.length) lines.push(`  after     ${after.length} tensors that are computed from those differ too`);
  const same = logits.filter((row, i) => row.indexOf(Math.max(...row)) === expected.answers[i]).length;
  let largest = 0;
  logits.forEach((row, i) => row.forEach((x, k) => { largest = Math.max(largest, Math.abs(x - expected.logits[i][k])); }));
  lines.push(`  answers   ${same} of ${images} as expected; logits differ by at most ${largest.toPrecision(2)}`);
  if (wrong.length) lines.push(`NOT THE SAME CODES: ${wrong.length} operations compute other codes from the same inputs`);
  else if (differing.size) lines.push('THE SAME CODES, up to what is computed in floating point');
  else lines.push('THE SAME CODES');
  return [lines, wrong.length === 0];
}

const given = process.argv.slice(2);
const option = given.indexOf('--codes');
const codes = option < 0 ? null : given.splice(option, 2)[1];
const bundle = given[0] ?? here;
const expected = readExpected(bundle);
const digests = Object.fromEntries(expected.tensors.map((tensor) => [tensor.name, []]));
const logits = [];

function write(name, bytes) {
  if (codes !== null) appendFileSync(join(codes, `${name}.bin`), bytes);
}

function take(outputs) {
  const row = outputs[expected.output].data;
  logits.push(Array.from(row));
  write('logits', bytesOf(row));
  expected.tensors.forEach((tensor, index) => {
    const bytes = bytesOf(outputs[tensor.name].data);
    digests[tensor.name].push(sha256(bytes).slice(0, 16));
    write(String(index), bytes);
  });
}

if (codes !== null) {
  rmSync(codes, { recursive: true, force: true });
  mkdirSync(codes, { recursive: true });
}
let version;
try {
  version = await run(bundle, expected, take);
} catch (error) {
  fail(`ONNX Runtime Web cannot run the file: ${error.message}`);
}
const [lines, passed] = verdict(expected, digests, logits);
const changed = changedFiles(bundle, expected);
console.log(`${expected.about}, on ONNX Runtime Web ${version}, WebAssembly`);
console.log([...changed, ...lines].join('\n'));
process.exit(passed && changed.length === 0 ? 0 : 1);
