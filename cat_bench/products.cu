// What the kernels of products.py share: Hopper's copy engine, barriers and tensor cores.

typedef unsigned long long u64;
typedef unsigned int u32;
typedef unsigned short u16;
struct alignas(64) TensorMap { u64 opaque[16]; };

constexpr int BK = 64;    // inputs in a tile, rows of 128 bytes: the width of the swizzle
constexpr int WARPS = 8;  // that multiply

// d (64, n) = or += a (64, 16) b^T, b (n, 16): bfloat16, b in shared memory, a there or in registers,
// sums in float32. Written by products.py for this kernel's n.
@WGMMA@

__device__ __forceinline__ u32 shared_address(const void* p) {
  return (u32)__cvta_generic_to_shared(p);
}
__device__ __forceinline__ void init(u32 barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" :: "r"(barrier), "r"(count) : "memory");
}
__device__ __forceinline__ void expect(u32 barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;"
    :: "r"(barrier), "r"(bytes) : "memory");
}
__device__ __forceinline__ void wait(u32 barrier, int parity) {
  asm volatile("{.reg .pred done;\n"
    "again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
    "@!done bra again;}" :: "r"(barrier), "r"(parity) : "memory");
}
__device__ __forceinline__ void arrive(u32 barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" :: "r"(barrier) : "memory");
}
// No `.release.cluster` here: its fence costs 0.8 us an iteration, and only reads went before.
__device__ __forceinline__ void arrive_at(u32 barrier, int cta) {
  asm volatile("{.reg .b32 there;\n"
    "mapa.shared::cluster.u32 there, %0, %1;\n"
    "mbarrier.arrive.shared::cluster.b64 _, [there];}" :: "r"(barrier), "r"(cta) : "memory");
}
__device__ __forceinline__ void load(u32 to, const TensorMap* map, int column, int row, u32 barrier) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
    " [%0], [%1, {%2, %3}], [%4];"
    :: "r"(to), "l"(map), "r"(column), "r"(row), "r"(barrier) : "memory");
}
__device__ __forceinline__ void load_for_both(
    u32 to, const TensorMap* map, int column, int row, u32 barrier) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
    ".multicast::cluster [%0], [%1, {%2, %3}], [%4], %5;"
    :: "r"(to), "l"(map), "r"(column), "r"(row), "r"(barrier), "h"((u16)3) : "memory");
}
__device__ __forceinline__ void meet() {  // all CTAs of a cluster; orders no memory
  asm volatile("barrier.cluster.arrive.relaxed.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
}
__device__ __forceinline__ void meet_after_writing() {  // and what they wrote is seen
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;"
    ::: "memory");
}
// Of a matrix in rows of 128 bytes, swizzled as the copy engine writes them.
__device__ __forceinline__ u64 descriptor(u32 address) {
  return (u64)((address & 0x3FFFF) >> 4) | 1ull << 16 | 64ull << 32 | 1ull << 62;
}
// Four matrices of 8 rows of 16 bytes, as a warp holds `a` (16, 16) for the tensor cores: lane l
// points at row l % 8 of matrix l / 8.
__device__ __forceinline__ void load_matrices(u32 (&a)[4], u32 address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
    : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3]) : "r"(address) : "memory");
}
// Of the four neighbouring threads that share a row.
__device__ __forceinline__ float of_row(float x) {
  x += __shfl_xor_sync(0xFFFFFFFF, x, 1);
  return x + __shfl_xor_sync(0xFFFFFFFF, x, 2);
}
__device__ __forceinline__ u32 pack(float low, float high) {
  u32 both;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
}
__device__ __forceinline__ float as_float(u32 half) { return __uint_as_float(half << 16); }
// To bfloat16 and back, as a product of its own would have left it.
__device__ __forceinline__ float rounded(float x) {
  return as_float(pack(x, 0.f));
}
__device__ __forceinline__ float swiglu(float gate, float up) {
  const float g = rounded(gate);
  return __fdividef(g, 1.f + __expf(-g)) * rounded(up);  // one rounding less exact, a tenth of the time
}
// One thread fills the ring with tiles 0 .. iterations - 1: those of W that fit before the kernel
// ahead has ended, of x after, the rest as the stages get empty.
template <typename LoadW, typename LoadX>
__device__ __forceinline__ void feed(int iterations, u32 empty, LoadW load_w, LoadX load_x) {
  const int ahead = STAGES < iterations ? STAGES : iterations;
  for (int i = 0; i < ahead; i++) load_w(i, i);
  asm volatile("griddepcontrol.wait;\ngriddepcontrol.launch_dependents;" ::: "memory");
  for (int i = 0; i < ahead; i++) load_x(i, i);
  for (int i = ahead; i < iterations; i++) {
    const int s = i % STAGES;
    wait(empty + 8 * s, (i / STAGES - 1) & 1);
    load_w(i, s);
    load_x(i, s);
  }
}

// The partner's first for our second, or our first for its second.
__device__ __forceinline__ void exchange(u32& first, u32& second, bool give_first, int partner) {
  const u32 got = __shfl_xor_sync(0xFFFFFFFF, give_first ? first : second, partner);
  first = give_first ? got : first;
  second = give_first ? second : got;
}
// Each of four neighbouring threads t holds, of four blocks of 8 columns, columns 2 t and 2 t + 1 (a
// pair in bfloat16). After it thread t holds block t, all 8 columns: 16 bytes to store at once.
__device__ __forceinline__ void transpose(u32 (&pair)[4]) {
  const bool odd = threadIdx.x & 1, high = threadIdx.x & 2;
  #pragma unroll
  for (int i = 0; i < 4; i += 2) exchange(pair[i], pair[i + 1], odd, 1);
  #pragma unroll
  for (int i = 0; i < 2; i++) exchange(pair[i], pair[i + 2], high, 2);
}
// Stores BLOCKS blocks of 8 columns of one row, `pair(j)` this thread's two columns of block j. All
// threads of a warp call it; `out` is the row's first column here, of which `columns` are inside.
template <int BLOCKS, typename Pair>
__device__ __forceinline__ void store_row(u16* out, int columns, bool inside, Pair pair) {
  const int mine = threadIdx.x % 4;
  #pragma unroll
  for (int j = 0; j < BLOCKS; j += 4) {
    u32 v[4];
    #pragma unroll
    for (int i = 0; i < 4; i++) v[i] = j + i < BLOCKS ? pair(j + i) : 0;
    transpose(v);
    if (inside && j + mine < BLOCKS && (j + mine) * 8 < columns)
      *(uint4*)(out + (j + mine) * 8) = make_uint4(v[0], v[1], v[2], v[3]);
  }
}
