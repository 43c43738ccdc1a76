// What only sm_90a has: the copy engine for tiles (TMA), its barriers, and products by a group of
// four warps (wgmma). Sources that need them start with this text after common.cuh.

// A CUtensorMap of the driver.
struct __align__(64) TensorMap {
    u64 words[16];
};

// Where something in shared memory is named by a u32, it is its address there (shared_address),
// which costs nothing to compute with; pointers are converted each time.

// ---- barriers in shared memory, with two phases ---------------------------------------------

__device__ __forceinline__ void barrier_init(u64* barrier, u32 arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
                 "r"(arrivals));
}
__device__ __forceinline__ void barrier_init_done() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ __forceinline__ void barrier_arrive(u32 barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ __forceinline__ void barrier_arrive(u64* barrier) {
    barrier_arrive(shared_address(barrier));
}
// Arrives at the barrier of the block of this rank in the cluster.
__device__ __forceinline__ void barrier_arrive_at(u64* barrier, u32 rank) {
    asm volatile(
        "{\n"
        ".reg .b32 there;\n"
        "mapa.shared::cluster.u32 there, %0, %1;\n"
        "mbarrier.arrive.shared::cluster.b64 _, [there];\n"
        "}\n" ::"r"(shared_address(barrier)),
        "r"(rank)
        : "memory");
}
// Arrives, and says how many bytes the copy engine will add to the phase.
__device__ __forceinline__ void barrier_expect(u32 barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier),
                 "r"(bytes)
                 : "memory");
}
__device__ __forceinline__ void barrier_expect(u64* barrier, u32 bytes) {
    barrier_expect(shared_address(barrier), bytes);
}
// Waits until the phase of this parity is over.
__device__ __forceinline__ void barrier_wait(u32 barrier, u32 parity) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@done bra over;\n"
        "bra again;\n"
        "over:\n"
        "}\n" ::"r"(barrier),
        "r"(parity)
        : "memory");
}
__device__ __forceinline__ void barrier_wait(u64* barrier, u32 parity) {
    barrier_wait(shared_address(barrier), parity);
}

// Starts to copy the box of `map` at (column, row) to shared memory, zeros outside of the tensor;
// its bytes count for the barrier.
__device__ __forceinline__ void copy_box(u32 to, const TensorMap& map, u32 column, u32 row,
                                         u32 barrier) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%2, %3}], [%4];" ::"r"(to),
        "l"(&map), "r"(column), "r"(row), "r"(barrier)
        : "memory");
}
__device__ __forceinline__ void copy_box(void* to, const TensorMap& map, u32 column, u32 row,
                                         u64* barrier) {
    copy_box(shared_address(to), map, column, row, shared_address(barrier));
}

// The same to the shared memory of all blocks of the cluster that `blocks` has a bit for, at the
// address that it has in each, and for the barrier there.
__device__ __forceinline__ void copy_box_to(u32 blocks, void* to, const TensorMap& map, u32 column,
                                            u32 row, u64* barrier) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
        ".multicast::cluster [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(shared_address(to)),
        "l"(&map), "r"(column), "r"(row), "r"(shared_address(barrier)), "h"((bf16)blocks)
        : "memory");
}

// ---- clusters of blocks ---------------------------------------------------------------------

__device__ __forceinline__ u32 cluster_rank() {
    u32 rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}
// Waits for all threads of the cluster that have not ended.
__device__ __forceinline__ void cluster_sync() {
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::
                     : "memory");
}
// The value that the block of this rank in the cluster has at this address of its shared memory.
__device__ __forceinline__ float load_shared_at(u32 address, u32 rank) {
    float v;
    asm volatile(
        "{\n"
        ".reg .b32 there;\n"
        "mapa.shared::cluster.u32 there, %1, %2;\n"
        "ld.shared::cluster.f32 %0, [there];\n"
        "}\n"
        : "=f"(v)
        : "r"(address), "r"(rank)
        : "memory");
    return v;
}
__device__ __forceinline__ float load_shared(u32 address) {
    float v;
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(v) : "r"(address) : "memory");
    return v;
}
__device__ __forceinline__ void store_shared(u32 address, float v) {
    asm volatile("st.shared.f32 [%0], %1;" ::"r"(address), "f"(v) : "memory");
}

// ---- registers of the warps of a group ------------------------------------------------------

template <int COUNT>
__device__ __forceinline__ void fewer_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}
template <int COUNT>
__device__ __forceinline__ void more_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}

// A barrier of `threads` threads, numbered 1 to 15.
__device__ __forceinline__ void group_sync(u32 number, u32 threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(number), "r"(threads) : "memory");
}

// ---- products -------------------------------------------------------------------------------
//
// Operands lie in shared memory as boxes of 64 columns of bf16 (128 bytes) a row, in the order
// that the copy engine's 128-byte swizzle gives them, at multiples of 1024 bytes.

// Where 16 bytes of such a box are, `chunk` 16 bytes from the beginning of their row.
__device__ __forceinline__ uint4* swizzled(bf16 (*box)[64], u32 row, u32 chunk) {
    return (uint4*)&box[row][(chunk ^ row % 8) * 8];
}

// Where an operand begins: rows in groups of 8, 1024 bytes apart. 16 columns on are 2 more.
__device__ __forceinline__ u64 operand(u32 address) {
    return (u64)((address & 0x3ffff) >> 4) | 1ull << 16 | 64ull << 32 | 1ull << 62;
}
__device__ __forceinline__ u64 operand(const void* p) { return operand(shared_address(p)); }

__device__ __forceinline__ void products_begin() {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void products_commit() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int PENDING>
__device__ __forceinline__ void products_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// Sums of a thread: rows lane / 4 and + 8 of the 16 of its warp; c[4 i + ...] of columns
// 8 i + lane % 4 * 2 and the next, first of the upper row, then of the lower one.
#define SUMS_8(C, I) \
    "+f"(C[I]), "+f"(C[I + 1]), "+f"(C[I + 2]), "+f"(C[I + 3]), "+f"(C[I + 4]), "+f"(C[I + 5]), \
        "+f"(C[I + 6]), "+f"(C[I + 7])
#define SUMS_32(C, I) SUMS_8(C, I), SUMS_8(C, I + 8), SUMS_8(C, I + 16), SUMS_8(C, I + 24)

// c (64 x 256) = a (64 x 16) b (256 x 16)^T, plus c where `add`.
__device__ __forceinline__ void product_64_256(float (&c)[128], u64 a, u64 b, u32 add) {
    asm volatile(
        "{\n"
        ".reg .pred add;\n"
        "setp.ne.b32 add, %130, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "
        "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "
        "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "
        "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, "
        "%111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, "
        "%125, %126, %127}, %128, %129, add, 1, 1, 0, 0;\n"
        "}\n"
        : SUMS_32(c, 0), SUMS_32(c, 32), SUMS_32(c, 64), SUMS_32(c, 96)
        : "l"(a), "l"(b), "r"(add));
}

// c (64 x 128) = a (64 x 16) b (128 x 16)^T, plus c where `add`.
__device__ __forceinline__ void product_64_128(float (&c)[64], u64 a, u64 b, u32 add) {
    asm volatile(
        "{\n"
        ".reg .pred add;\n"
        "setp.ne.b32 add, %66, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, %64, %65, add, 1, 1, 0, 0;\n"
        "}\n"
        : SUMS_32(c, 0), SUMS_32(c, 32)
        : "l"(a), "l"(b), "r"(add));
}

// c (64 x 128) = a (64 x 16) b (16 x 128), plus c where `add`: a in registers, as for mma, rows of b
// columns of the other.
__device__ __forceinline__ void product_columns(float (&c)[64], const u32 (&a)[4], u64 b, u32 add) {
    asm volatile(
        "{\n"
        ".reg .pred add;\n"
        "setp.ne.b32 add, %69, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, {%64, %65, %66, %67}, %68, add, 1, 1, 1;\n"
        "}\n"
        : SUMS_32(c, 0), SUMS_32(c, 32)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));
}

// The same with 64 columns.
__device__ __forceinline__ void product_columns(float (&c)[32], const u32 (&a)[4], u64 b, u32 add) {
    asm volatile(
        "{\n"
        ".reg .pred add;\n"
        "setp.ne.b32 add, %37, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, {%32, %33, %34, %35}, %36, add, 1, 1, 1;\n"
        "}\n"
        : SUMS_32(c, 0)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));
}

// c (64 x N) += a (64 x 16) b (N x 16)^T: a in registers, as for mma; N is twice the sums.
#define PRODUCT_ROWS(SUMS, N, LIST, OPERANDS, ...)                                              \
    __device__ __forceinline__ void product_rows(float (&c)[SUMS], const u32 (&a)[4], u64 b) {  \
        asm volatile("{\n.reg .pred add;\nsetp.eq.b32 add, 0, 0;\n"                            \
                     "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" LIST          \
                     "}, " OPERANDS ", add, 1, 1, 0;\n}\n"                                      \
                     : __VA_ARGS__                                                              \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                     \
    }
PRODUCT_ROWS(4, 8, "%0, %1, %2, %3", "{%4, %5, %6, %7}, %8", "+f"(c[0]), "+f"(c[1]), "+f"(c[2]),
             "+f"(c[3]))
PRODUCT_ROWS(8, 16, "%0, %1, %2, %3, %4, %5, %6, %7", "{%8, %9, %10, %11}, %12", SUMS_8(c, 0))
PRODUCT_ROWS(16, 32, "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15",
             "{%16, %17, %18, %19}, %20", SUMS_8(c, 0), SUMS_8(c, 8))
PRODUCT_ROWS(32, 64,
             "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
             "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31",
             "{%32, %33, %34, %35}, %36", SUMS_32(c, 0))

// Where such a b begins: boxes of 64 columns `pitch` bytes apart. 16 rows on are 128 more.
__device__ __forceinline__ u64 operand_columns(const void* p, u32 pitch) {
    return (u64)((shared_address(p) & 0x3ffff) >> 4) | (u64)(pitch >> 4) << 16 | 64ull << 32 |
           1ull << 62;
}

// What threads wrote to shared memory before is seen by products and the copy engine after it.
__device__ __forceinline__ void publish_shared() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
