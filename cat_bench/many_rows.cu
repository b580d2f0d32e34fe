// y = x W^T or y = silu(x Wg^T) * (x Wu^T), of hundreds of rows or more; x with or without an
// RMSNorm before. Behind products.cu, compiled by products.py, which defines K (inputs), N
// (outputs), MI, BN, STAGES, SWIGLU and NORM.
//
// As many CTAs as multiprocessors walk through the tiles of 128 MI rows by BN rows of W, with
// SWIGLU half of them of the gate and half of up. The first thread asks the copy engine for tiles
// of 64 inputs, through a ring of STAGES that goes on from one tile of y to the next; two warp
// groups multiply half of the rows each. W is asked for before the kernel ahead has ended, x after.
//
// Without NORM the two CTAs of a cluster have the same columns: each asks for half of W for both.
// With it x passes through registers, where it is multiplied by the norm's weight and its squares
// are summed; the root mean square, known after the last input, divides the sums. One rounding, as
// the norm alone has.

constexpr int BM = 128 * MI, HALF_BN = BN / 2, ITERATIONS = (K + BK - 1) / BK;
constexpr int OUTPUTS = SWIGLU ? HALF_BN : BN;  // of a tile
constexpr int PAIR = !NORM;
constexpr int X_BYTES = BM * BK * 2, W_BYTES = BN * BK * 2, STAGE = X_BYTES + W_BYTES;
static_assert(HALF_BN % 8 == 0 && N % 8 == 0, "the tiles must fit");
static_assert(!NORM || MI == 1, "x needs the registers of a second tile of sums");

// Of a tile's inputs, in registers: each row's squares are added to `squares`, of the thread's rows
// and those 8 below, then x is multiplied by `gain` (32 pairs in shared memory).
__device__ __forceinline__ void apply_gain(u32 (&x)[BK / 16][4], u32 gain, float (&squares)[2]) {
  #pragma unroll
  for (int k = 0; k < BK / 16; k++)
    #pragma unroll
    for (int i = 0; i < 4; i++) {
      const float low = __uint_as_float(x[k][i] << 16);
      const float high = __uint_as_float(x[k][i] & 0xFFFF0000);
      squares[i & 1] = fmaf(low, low, fmaf(high, high, squares[i & 1]));
      u32 g;
      asm volatile("ld.shared.b32 %0, [%1];"
        : "=r"(g) : "r"(gain + (k * 8 + i / 2 * 4 + threadIdx.x % 4) * 4));
      // volatile: it must stay before wgmma.fence
      asm volatile("mul.rn.bf16x2 %0, %0, %1;" : "+r"(x[k][i]) : "r"(g));
    }
}

// A tile's part of y: a thread holds 2 of every 8 columns, in rows 8 apart from `first_row` on.
__device__ __forceinline__ void store_tile(
    const float (&d)[MI][HALF_BN], const float (&squares)[2], u16* y, int rows, int stride,
    float eps, int first_row, int first) {
  #pragma unroll
  for (int m = 0; m < MI; m++)
    #pragma unroll
    for (int h = 0; h < 2; h++) {
      const int row = first_row + m * 64 + h * 8;
      const float scale = NORM ? rsqrtf(of_row(squares[h]) / K + eps) : 1.f;
      store_row<OUTPUTS / 8>(y + (u64)row * stride + first, N - first, row < rows, [&](int j) {
        const float* a = &d[m][4 * j + 2 * h];
        if (!SWIGLU) return pack(a[0] * scale, a[1] * scale);
        const float* up = &d[m][4 * (j + HALF_BN / 8) + 2 * h];
        return pack(swiglu(a[0] * scale, up[0] * scale), swiglu(a[1] * scale, up[1] * scale));
      });
    }
}

extern "C" __global__ void __launch_bounds__(384, 1) many_rows(
    const __grid_constant__ TensorMap x_map, const __grid_constant__ TensorMap w_map, u16* y,
    const u32* gain, float eps, int rows, int stride) {
  extern __shared__ unsigned char raw[];
  const int group = threadIdx.x / 128, warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
  constexpr int CTAS = PAIR ? 2 : 1;  // that share a tile of W; `tiles` are theirs
  const int me = blockIdx.x % CTAS, worker = blockIdx.x / CTAS, workers = gridDim.x / CTAS;
  const int row_tiles = (rows + CTAS * BM - 1) / (CTAS * BM);
  const int tiles = row_tiles * ((N + OUTPUTS - 1) / OUTPUTS);
  const int steps = (tiles - worker + workers - 1) / workers * ITERATIONS;
  const u32 base = (shared_address(raw) + 1023) & ~1023u;
  const u32 full = base + STAGES * STAGE, empty = full + 8 * STAGES, gains = empty + 8 * STAGES;
  if (threadIdx.x == 0) {
    for (int s = 0; s < STAGES; s++) {
      init(full + 8 * s, 1);
      init(empty + 8 * s, CTAS * WARPS);  // each CTA of a pair writes into the other's ring
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();
  if (PAIR) meet();

  if (group == 0) {
    if (MI * BN > 128) asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    if (threadIdx.x == 0) {
      // Tiles of the same columns are neighbours: they read W at the same time, once from memory.
      auto load_w = [&](int i, int s) {
        expect(full + 8 * s, STAGE);
        const int tile = worker + i / ITERATIONS * workers, first = tile / row_tiles * OUTPUTS;
        for (int half = PAIR ? me : 0; half < (PAIR ? me + 1 : 2); half++) {
          const u32 to = base + s * STAGE + X_BYTES + half * W_BYTES / 2;
          const int column = i % ITERATIONS * BK, row = first + half * (SWIGLU ? N : HALF_BN);
          if (PAIR) load_for_both(to, &w_map, column, row, full + 8 * s);
          else load(to, &w_map, column, row, full + 8 * s);
        }
      };
      auto load_x = [&](int i, int s) {
        const int tile = worker + i / ITERATIONS * workers;
        load(base + s * STAGE, &x_map, i % ITERATIONS * BK, (tile % row_tiles * CTAS + me) * BM,
             full + 8 * s);
      };
      feed(steps, empty, load_w, load_x);
    }
    __syncwarp();
  } else {
    if (MI * BN > 128) asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    if (NORM) {
      for (int i = threadIdx.x - 128; i < ITERATIONS * BK / 2; i += 256)
        asm volatile("st.shared.b32 [%0], %1;"
          :: "r"(gains + 4 * i), "r"(i < K / 2 ? gain[i] : 0) : "memory");
      asm volatile("bar.sync 1, 256;" ::: "memory");
    }
    asm volatile("griddepcontrol.wait;" ::: "memory");  // before y is written
    const u32 x_at = (group - 1) * MI * 64 * BK * 2;
    // What a thread tells ldmatrix: a row, and which 8 of 16 inputs, swizzled as in `descriptor`.
    const u32 my_row = x_at + (warp * 16 + lane % 16) * BK * 2;
    int step = 0;
    // A stage. Told only where somebody waits for it: none is on its way when the other CTA ends.
    auto release = [&](int read) {
      if (lane < CTAS && read + STAGES < steps) {
        if (PAIR) arrive_at(empty + 8 * (read % STAGES), lane);
        else arrive(empty + 8 * (read % STAGES));
      }
      __syncwarp();
    };
    for (int tile = worker; tile < tiles; tile += workers) {
      float d[MI][HALF_BN], squares[2] = {0.f, 0.f};
      u32 x[2][BK / 16][4];  // of this tile of inputs and the last, which is still being read
      for (int first = 0; first < ITERATIONS; first += 2)
        #pragma unroll
        for (int odd = 0; odd < 2; odd++) {
          const int i = first + odd;
          if (ITERATIONS % 2 && i == ITERATIONS) break;
          const u32 at = base + step % STAGES * STAGE;
          wait(full + 8 * (step % STAGES), step / STAGES & 1);
          if (NORM) {
            #pragma unroll
            for (int k = 0; k < BK / 16; k++)
              load_matrices(x[odd][k], at + my_row + ((2 * k + lane / 16) ^ lane % 8) * 16);
            apply_gain(x[odd], gains + i * BK * 2, squares);
          }
          asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
          #pragma unroll
          for (int k = 0; k < BK / 16; k++)
            #pragma unroll
            for (int m = 0; m < MI; m++) {
              const u64 w = descriptor(at + X_BYTES + k * 32);
              if (NORM) wgmma(d[m], x[odd][k], w, i | k);
              else wgmma(d[m], descriptor(at + x_at + m * 64 * BK * 2 + k * 32), w, i | k);
            }
          asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
          if (i > 0) {
            asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
            release(step - 1);
          }
          step++;
        }
      asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
      release(step - 1);
      #pragma unroll
      for (int m = 0; m < MI; m++)
        #pragma unroll
        for (int i = 0; i < HALF_BN; i++) asm volatile("" : "+f"(d[m][i]) :: "memory");

      const int first_row =
          (tile % row_tiles * CTAS + me) * BM + (group - 1) * MI * 64 + warp * 16 + lane / 4;
      const int first = tile / row_tiles * OUTPUTS;
      store_tile(d, squares, y, rows, stride, eps, first_row, first);
    }
  }
  __syncwarp();
  if (PAIR) meet();  // the other CTA may still reach for this one's barriers
}
