// y = x W^T, y += x W^T, or y = silu(x Wg^T) * (x Wu^T), of a few rows. Behind products.cu, compiled
// by products.py, which defines K (inputs), N (rows of W), R (rows of x, padded to a multiple of 8),
// SPLITS, STAGES, SWIGLU and ADD.
//
// The time is that of reading W, so it is asked for early: as much as fits the ring of STAGES lies
// in shared memory before the kernel ahead has ended. A CTA computes 128 outputs, with SWIGLU 64 of
// the gate and 64 of up. W is the first operand of the tensor cores, x the second. The CTAs of a
// cluster have the same outputs and split K; each adds up an R / SPLITS-th of the rows.

constexpr int BM = 128, W_BYTES = BM * BK * 2, X_BYTES = R * BK * 2, STAGE = W_BYTES + X_BYTES;
constexpr int TILES = (K + BK - 1) / BK, LINE = BM + 4;  // of sums, padded: fewer bank conflicts
static_assert(R % 8 == 0 && R % SPLITS == 0 && N % 8 == 0 && TILES >= SPLITS, "the tiles must fit");

extern "C" __global__ void __launch_bounds__(384) few_rows(
    const __grid_constant__ TensorMap x_map, const __grid_constant__ TensorMap w_map, u16* y, int rows,
    int stride) {
  extern __shared__ unsigned char raw[];
  const int group = threadIdx.x / 128, warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
  const int split = blockIdx.x % SPLITS, tile = blockIdx.x / SPLITS;
  const int first = split * TILES / SPLITS, iterations = (split + 1) * TILES / SPLITS - first;
  const u32 base = (shared_address(raw) + 1023) & ~1023u;
  const u32 full = base + STAGES * STAGE, empty = full + 8 * STAGES;
  if (threadIdx.x == 0) {
    for (int s = 0; s < STAGES; s++) {
      init(full + 8 * s, 1);
      init(empty + 8 * s, WARPS);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();

  if (group == 0) {
    if (threadIdx.x == 0) {
      auto load_w = [&](int i, int s) {
        expect(full + 8 * s, STAGE);
        for (int half = 0; half < 2; half++) {
          const int row = SWIGLU ? half * (N / 2) + tile * 64 : tile * BM + half * 64;
          load(base + s * STAGE + half * W_BYTES / 2, &w_map, (first + i) * BK, row, full + 8 * s);
        }
      };
      auto load_x = [&](int i, int s) {
        load(base + s * STAGE + W_BYTES, &x_map, (first + i) * BK, 0, full + 8 * s);
      };
      feed(iterations, empty, load_w, load_x);
    }
    __syncwarp();
  } else {
    float d[R / 2];
    for (int i = 0; i < iterations; i++) {
      const int s = i % STAGES;
      wait(full + 8 * s, i / STAGES & 1);
      asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
      #pragma unroll
      for (int k = 0; k < BK / 16; k++)
        wgmma(d, descriptor(base + s * STAGE + (group - 1) * W_BYTES / 2 + k * 32),
              descriptor(base + s * STAGE + W_BYTES + k * 32), i | k);
      asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
      if (i > 0) {
        asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
        if (lane == 0) arrive(empty + 8 * ((i - 1) % STAGES));
        __syncwarp();
      }
    }
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
    #pragma unroll
    for (int i = 0; i < R / 2; i++) asm volatile("" : "+f"(d[i]) :: "memory");
    asm volatile("bar.sync 1, 256;" ::: "memory");  // the other group may still read the ring
    const int output = (group - 1) * 64 + warp * 16 + lane / 4;
    #pragma unroll
    for (int i = 0; i < R / 2; i++) {
      const int row = i / 4 * 8 + lane % 4 * 2 + i % 2;
      asm volatile("st.shared.f32 [%0], %1;"
        :: "r"(base + (row * LINE + output + i / 2 % 2 * 8) * 4), "f"(d[i]) : "memory");
    }
  }
  __syncwarp();
  if (SPLITS > 1) meet_after_writing(); else __syncthreads();

  asm volatile("griddepcontrol.wait;" ::: "memory");  // before y is read or written
  constexpr int SHARE = R / SPLITS, WIDE = SWIGLU ? 64 : 128, OUTPUTS = SWIGLU ? N / 2 : N;
  auto sum = [&](int row, int output, float* total) {  // of four outputs, over the cluster
    for (int q = 0; q < 4; q++) total[q] = 0.f;
    #pragma unroll
    for (int p = 0; p < SPLITS; p++) {
      float v[4];
      asm volatile("{.reg .b32 there;\n"
        "mapa.shared::cluster.u32 there, %4, %5;\n"
        "ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [there];}"
        : "=f"(v[0]), "=f"(v[1]), "=f"(v[2]), "=f"(v[3])
        : "r"(base + (row * LINE + output) * 4), "r"(p) : "memory");
      for (int q = 0; q < 4; q++) total[q] += v[q];
    }
  };
  for (int i = threadIdx.x; i < SHARE * WIDE / 4; i += 384) {
    const int row = split * SHARE + i / (WIDE / 4), output = i % (WIDE / 4) * 4;
    const int column = tile * WIDE + output;
    if (row >= rows || column >= OUTPUTS) continue;
    float a[4];
    sum(row, output, a);
    uint2* out = (uint2*)(y + (u64)row * stride + column);
    if (SWIGLU) {
      float up[4];
      sum(row, output + 64, up);
      for (int q = 0; q < 4; q++) a[q] = swiglu(a[q], up[q]);
    }
    if (ADD) {
      const uint2 old = *out;
      a[0] += as_float(old.x & 0xFFFF);
      a[1] += as_float(old.x >> 16);
      a[2] += as_float(old.y & 0xFFFF);
      a[3] += as_float(old.y >> 16);
    }
    *out = make_uint2(pack(a[0], a[1]), pack(a[2], a[3]));
  }
  __syncwarp();
  if (SPLITS > 1) meet();  // another CTA may still read the sums of this one
}
