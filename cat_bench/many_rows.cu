// y = x W^T, y += x W^T, or y = silu(x Wg^T) * (x Wu^T), of hundreds of rows or more. Behind
// products.cu, compiled by products.py, which defines K (inputs), N (outputs), MI, BN, STAGES, SWIGLU
// and ADD.
//
// As many CTAs as multiprocessors walk through the tiles of 128 MI rows by BN rows of W, with SWIGLU
// half of them of the gate and half of up. The first thread asks the copy engine for tiles of 64
// inputs, through a ring of STAGES that goes on from one tile of y to the next; two warp groups
// multiply half of the rows each. W is asked for before the kernel ahead has ended, x after.

constexpr int BM = 128 * MI, HALF_BN = BN / 2, ITERATIONS = (K + BK - 1) / BK;
constexpr int OUTPUTS = SWIGLU ? HALF_BN : BN;  // of a tile
constexpr int X_BYTES = BM * BK * 2, W_BYTES = BN * BK * 2, STAGE = X_BYTES + W_BYTES;
static_assert(HALF_BN % 8 == 0 && N % 8 == 0, "the tiles must fit");

extern "C" __global__ void __launch_bounds__(384, 1) many_rows(
    const __grid_constant__ TensorMap x_map, const __grid_constant__ TensorMap w_map, u16* y, int rows,
    int stride) {
  extern __shared__ unsigned char raw[];
  const int group = threadIdx.x / 128, warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
  const int row_tiles = (rows + BM - 1) / BM, tiles = row_tiles * ((N + OUTPUTS - 1) / OUTPUTS);
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
    if (MI * BN > 256) asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    if (threadIdx.x == 0) {
      // Tiles of the same columns are neighbours: they read W at the same time, once from memory.
      auto load_w = [&](int i, int s) {
        expect(full + 8 * s, STAGE);
        const int tile = blockIdx.x + i / ITERATIONS * gridDim.x, first = tile / row_tiles * OUTPUTS;
        for (int half = 0; half < 2; half++)
          load(base + s * STAGE + X_BYTES + half * W_BYTES / 2, &w_map, i % ITERATIONS * BK,
               first + half * (SWIGLU ? N : HALF_BN), full + 8 * s);
      };
      auto load_x = [&](int i, int s) {
        const int tile = blockIdx.x + i / ITERATIONS * gridDim.x;
        load(base + s * STAGE, &x_map, i % ITERATIONS * BK, tile % row_tiles * BM, full + 8 * s);
      };
      const int mine = (tiles - blockIdx.x + gridDim.x - 1) / gridDim.x;
      feed(mine * ITERATIONS, empty, load_w, load_x);
    }
    __syncwarp();
  } else {
    if (MI * BN > 256) asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    asm volatile("griddepcontrol.wait;" ::: "memory");  // before y is read or written
    const u32 x_at = (group - 1) * MI * 64 * BK * 2;
    int step = 0;
    for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
      float d[MI][HALF_BN];
      for (int i = 0; i < ITERATIONS; i++, step++) {
        const int s = step % STAGES;
        wait(full + 8 * s, step / STAGES & 1);
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
          if (lane == 0) arrive(empty + 8 * ((step - 1) % STAGES));
          __syncwarp();
        }
      }
      asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
      if (lane == 0) arrive(empty + 8 * ((step - 1) % STAGES));
      __syncwarp();
      #pragma unroll
      for (int m = 0; m < MI; m++)
        #pragma unroll
        for (int i = 0; i < HALF_BN; i++) asm volatile("" : "+f"(d[m][i]) :: "memory");

      const int first_row = tile % row_tiles * BM + (group - 1) * MI * 64 + warp * 16 + lane / 4;
      const int first = tile / row_tiles * OUTPUTS;
      #pragma unroll
      for (int m = 0; m < MI; m++)
        #pragma unroll
        for (int h = 0; h < 2; h++) {  // a thread holds two neighbours of every 8 columns, in rows 8 apart
          const int row = first_row + m * 64 + h * 8;
          u16* out = y + (u64)row * stride + first;
          store_row<OUTPUTS / 8>(out, N - first, row < rows, [&](int j) {
            const float* a = &d[m][4 * j + 2 * h];
            if (SWIGLU) {
              const float* up = &d[m][4 * (j + HALF_BN / 8) + 2 * h];
              return pack(swiglu(a[0], up[0]), swiglu(a[1], up[1]));
            }
            if (ADD && row < rows && first + 8 * j < N) {
              const u32 old = *(const u32*)(out + 8 * j + lane % 4 * 2);
              return pack(a[0] + as_float(old & 0xFFFF), a[1] + as_float(old >> 16));
            }
            return pack(a[0], a[1]);
          });
        }
    }
  }
}
