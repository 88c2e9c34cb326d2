// The vectors, read and run without refmerge or Python: node vectors.mjs FOLDER. Prints what was checked, as JSON.
// Every array of every file is decoded; the last step of each test that has steps is its result.
// wise_ft and linear are merged, in double precision, and compared.
import { readFileSync, readdirSync } from "node:fs";
import { join } from "node:path";

const WIDTH = { F64: 8, F32: 4, F16: 2, BF16: 2, I64: 8, I32: 4, I16: 2, I8: 1, U8: 1, BOOL: 1 };

const half = (bits) => {
  const sign = bits >> 15 ? -1 : 1, exponent = (bits >> 10) & 31, fraction = bits & 1023;
  if (exponent === 31) return fraction ? NaN : sign * Infinity;
  return sign * (exponent ? 2 ** (exponent - 15) * (1 + fraction / 1024) : 2 ** -24 * fraction);
};
const single = (bits) => new DataView(Uint32Array.of(bits).buffer).getFloat32(0, true);
const READ = {
  F64: (v, i) => v.getFloat64(i, true), F32: (v, i) => v.getFloat32(i, true), F16: (v, i) => half(v.getUint16(i, true)),
  BF16: (v, i) => single((v.getUint16(i, true) << 16) >>> 0), I64: (v, i) => Number(v.getBigInt64(i, true)),
  I32: (v, i) => v.getInt32(i, true), I16: (v, i) => v.getInt16(i, true), I8: (v, i) => v.getInt8(i),
  U8: (v, i) => v.getUint8(i), BOOL: (v, i) => v.getUint8(i),
};

function safetensors(path) {
  let bytes;
  try {
    bytes = readFileSync(path);
  } catch {
    return {};
  }
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const length = Number(view.getBigUint64(0, true));
  const found = {};
  for (const [name, { dtype, shape, data_offsets: [start, stop] }] of Object.entries(JSON.parse(bytes.toString("utf8", 8, 8 + length)))) {
    if (name === "__metadata__") continue;
    const data = [];
    for (let at = 8 + length + start; at < 8 + length + stop; at += WIDTH[dtype]) data.push(READ[dtype](view, at));
    found[name] = { dtype, shape, data };
  }
  return found;
}

const count = (shape) => shape.reduce((a, b) => a * b, 1);
let arrays = 0;
function array(x, twin, where) {
  const found = "$ref" in x ? twin[x.$ref] : { ...x, data: x.data.flat().map(Number) };
  if (found === undefined || found.data.length !== count(found.shape)) throw new Error(`${where}: an array is not what its shape says`);
  arrays += 1;
  return found;
}
const model = (m, twin, where) => Object.fromEntries(Object.entries(m).map(([k, x]) => [k, array(x, twin, where)]));

const METHODS = {
  wise_ft: (models, base, { alpha = 0.5 }) => {
    if (models.length !== 1 || !base) throw new Error("one model and a base");
    return (name, i) => (1 - alpha) * base[name].data[i] + alpha * models[0][name].data[i];
  },
  linear: (models, base, { weight = 1, normalize = true }) => {
    let w = Array.isArray(weight) ? weight.map(Number) : models.map(() => Number(weight));
    const sum = w.reduce((a, b) => a + b, 0);
    if (!models.length || w.length !== models.length || (normalize && sum === 0) || w.some(Number.isNaN)) throw new Error("weights");
    if (normalize) w = w.map((x) => x / sum);
    return (name, i) => models.reduce((total, m, n) => total + w[n] * m[name].data[i], 0);
  },
};
const LEAST = { F64: 2 ** -1074, F32: 2 ** -149, F16: 2 ** -24, BF16: 2 ** -133 };
const EPSILON = { F64: 2 ** -52, F32: 2 ** -23, F16: 2 ** -10, BF16: 2 ** -7 };
const LARGEST = { F64: Number.MAX_VALUE, F32: 3.4028234663852886e38, F16: 65504, BF16: 3.3895313892515355e38 };

const folder = process.argv[2];
const run = { files: 0, tests: 0, merged: 0, failures: [] };
for (const file of readdirSync(folder).filter((f) => /\.json$/.test(f) && !/(\.schema|^collection)\.json$/.test(f)).sort()) {
  const document = JSON.parse(readFileSync(join(folder, file), "utf8"));
  const twin = safetensors(join(folder, file.replace(/json$/, "safetensors")));
  run.files += 1;
  for (const group of document.groups)
    for (const test of group.tests) {
      run.tests += 1;
      const models = test.models.map((m) => model(m, twin, test.id));
      const base = test.base && model(test.base, twin, test.id);
      (test.stats ?? []).forEach((s) => model(s, twin, test.id));
      const expect = model(test.expect, twin, test.id);
      let last = Object.values(expect)[0];
      for (const { step, values } of test.stages ?? [])
        for (const [name, value] of Object.entries(values))
          for (const x of [value].flat().map((x) => array(x, twin, `${test.id}, step ${step}`))) if (name === "result") last = x;
      if (!test.tolerance && last !== undefined && String(last.data) !== String(Object.values(expect)[0].data))
        run.failures.push(`${test.id}: the last step is not the result`);
      const method = METHODS[group.entry];
      if (!method || test.result !== "valid" || group.options || Object.values(expect).some((x) => !(x.dtype in EPSILON))) continue;
      run.merged += 1;
      const at = method(models, base, group.params);
      for (const [name, { dtype, data }] of Object.entries(expect)) {
        const finite = data.filter(Number.isFinite).map(Math.abs);
        const scale = finite.reduce((a, b) => Math.max(a, b), 0);
        // Of a result that is not rounded here; where terms are subnormal, each may lose half of the least number.
        const allowed = Math.max(test.tolerance, EPSILON[dtype]) * scale + models.length * LEAST[dtype];
        data.forEach((y, i) => {
          const x = at(name, i);
          const same = Number.isFinite(y) ? Math.abs(x - y) <= allowed : Object.is(x, y) || Math.abs(x) > LARGEST[dtype];
          if (!same) run.failures.push(`${test.id} ${name}[${i}]: ${x}, expected ${y}`);
        });
      }
    }
  if (document.number_of_tests !== document.groups.reduce((n, g) => n + g.tests.length, 0)) run.failures.push(`${file}: number_of_tests`);
}
console.log(JSON.stringify({ ...run, arrays }));
