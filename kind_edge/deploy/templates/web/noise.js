/** Standard normal noise of image `image` under a key of two 32-bit words; see docs/noise.md. */
export function gaussianNoise(key, image, count) {
  const noise = new Float32Array(Math.ceil(count / 4) * 4);
  for (let start = 0; start < noise.length; start += 4) {
    const words = philox4x32([start / 4, image, 0, 0], key);
    for (let pair = 0; pair < 4; pair += 2) {
      const radius = Math.sqrt(-2 * Math.log((words[pair] + 0.5) / 4294967296));
      const angle = 6.283185307179586 * ((words[pair + 1] + 0.5) / 4294967296);
      noise[start + pair] = radius * Math.cos(angle);
      noise[start + pair + 1] = radius * Math.sin(angle);
    }
  }
  return noise.slice(0, count);
}

function philox4x32([c0, c1, c2, c3], [k0, k1]) {
  for (let round = 0; round < 10; round++) {
    const [high0, low0] = [highHalf(0xd2511f53, c0), Math.imul(0xd2511f53, c0) >>> 0];
    const [high1, low1] = [highHalf(0xcd9e8d57, c2), Math.imul(0xcd9e8d57, c2) >>> 0];
    [c0, c1, c2, c3] = [(high1 ^ c1 ^ k0) >>> 0, low1, (high0 ^ c3 ^ k1) >>> 0, low0];
    k0 = (k0 + 0x9e3779b9) >>> 0;
    k1 = (k1 + 0xbb67ae85) >>> 0;
  }
  return [c0, c1, c2, c3];
}

/** The upper 32 bits of a 64-bit product, put together from 16-bit halves. */
function highHalf(a, b) {
  const low = (a & 0xffff) * (b & 0xffff);
  const middle = (a >>> 16) * (b & 0xffff) + Math.floor(low / 65536);
  const other = (a & 0xffff) * (b >>> 16) + (middle % 65536);
  return ((a >>> 16) * (b >>> 16) + Math.floor(middle / 65536) + Math.floor(other / 65536)) >>> 0;
}
