// y = silu(x Wg^T) * (x Wu^T) of a few hundred rows. Behind products.cu, compiled by products.py,
// which defines K (inputs), HALF (outputs: rows of Wg), BN, MI and STAGES.
//
// A CTA computes BN columns, BN / 2 of the gate and the same of up, for 128 MI rows of x. Its first
// thread asks the copy engine for tiles of 64 inputs, through a ring of STAGES; two warp groups
// multiply. The two CTAs of a cluster have the same columns: each fetches half of a tile of W for
// both. W is asked for before the kernel ahead has ended, x after.

constexpr int BM = 128 * MI, HALF_BN = BN / 2, ITERATIONS = K / BK;
constexpr int X_BYTES = BM * BK * 2, W_BYTES = BN * BK * 2, STAGE = X_BYTES + W_BYTES;
static_assert(K % BK == 0 && HALF % HALF_BN == 0 && HALF_BN % 8 == 0, "the tiles must fit");

extern "C" __global__ void __launch_bounds__(384, 1) swiglu_rows(
    const __grid_constant__ TensorMap x_map, const __grid_constant__ TensorMap w_map, u16* y, int rows) {
  extern __shared__ unsigned char raw[];
  const int group = threadIdx.x / 128, warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
  const int columns = blockIdx.x * HALF_BN, first_row = blockIdx.y * BM, me = blockIdx.y % 2;
  const u32 base = (shared_address(raw) + 1023) & ~1023u;
  const u32 full = base + STAGES * STAGE, empty = full + 8 * STAGES;
  if (threadIdx.x == 0) {
    for (int s = 0; s < STAGES; s++) {
      init(full + 8 * s, 1);
      init(empty + 8 * s, 2 * WARPS);  // of both CTAs: each writes into the other's ring
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();
  meet();

  if (group == 0) {
    if (MI * BN > 256) asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    if (threadIdx.x == 0) {
      auto load_w = [&](int i, int s) {
        expect(full + 8 * s, STAGE);
        const u32 to = base + s * STAGE + X_BYTES + me * HALF_BN * BK * 2;
        load_for_both(to, &w_map, i * BK, me * HALF + columns, full + 8 * s);
      };
      auto load_x = [&](int i, int s) {
        load(base + s * STAGE, &x_map, i * BK, first_row, full + 8 * s);
      };
      feed(ITERATIONS, empty, load_w, load_x);
    }
    __syncwarp();
  } else {
    if (MI * BN > 256) asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    asm volatile("griddepcontrol.wait;" ::: "memory");  // before y is written
    float d[MI][HALF_BN];
    const u32 x_at = (group - 1) * MI * 64 * BK * 2;
    for (int i = 0; i < ITERATIONS; i++) {
      const int s = i % STAGES;
      wait(full + 8 * s, i / STAGES & 1);
      asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
      #pragma unroll
      for (int k = 0; k < BK / 16; k++)
        #pragma unroll
        for (int m = 0; m < MI; m++)
          wgmma(d[m], descriptor(base + s * STAGE + x_at + m * 64 * BK * 2 + k * 32),
                descriptor(base + s * STAGE + X_BYTES + k * 32), i | k);
      asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
      if (i > 0) {
        asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
        // Only where somebody waits for it: none is on its way when the other CTA has ended.
        if (lane < 2 && i - 1 + STAGES < ITERATIONS) arrive_at(empty + 8 * ((i - 1) % STAGES), lane);
        __syncwarp();
      }
    }
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
    #pragma unroll
    for (int m = 0; m < MI; m++)
      #pragma unroll
      for (int i = 0; i < HALF_BN; i++) asm volatile("" : "+f"(d[m][i]) :: "memory");

    // A thread holds, of 8 columns j, two neighbours in each of two rows, 8 apart.
    #pragma unroll
    for (int m = 0; m < MI; m++)
      #pragma unroll
      for (int h = 0; h < 2; h++) {
        const int row = first_row + ((group - 1) * MI + m) * 64 + warp * 16 + h * 8 + lane / 4;
        if (row >= rows) continue;
        u32* out = (u32*)(y + (u64)row * HALF + columns + lane % 4 * 2);
        #pragma unroll
        for (int j = 0; j < HALF_BN / 8; j++) {
          const float* gate = &d[m][4 * j + 2 * h];
          const float* up = &d[m][4 * (j + HALF_BN / 8) + 2 * h];
          out[4 * j] = pack(swiglu(gate[0], up[0]), swiglu(gate[1], up[1]));
        }
      }
  }
  __syncwarp();
  meet();  // the other CTA may still reach for this one's barriers
}
