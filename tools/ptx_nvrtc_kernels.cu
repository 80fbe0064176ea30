// Kernels in CUDA C++ whose PTX, made by NVRTC, the emulator must run (see make_ptx_data.py). One part is compiled at a
// time, for one level:
// part groups sm_80
// part fragments sm_80
// part wide sm_80
// part halves sm_80
// part stages sm_80
// part handed sm_90
#include <cooperative_groups.h>
#include <cooperative_groups/reduce.h>
#include <cooperative_groups/scan.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace cg = cooperative_groups;

#ifdef PART_GROUPS
// Parts of a warp that reduce, scan, vote and match among themselves at the same time: their member masks differ.
extern "C" __global__ void groups(const int* x, int* y, int n) {
    auto block = cg::this_thread_block();
    auto half = cg::tiled_partition<16>(block);
    auto warp = cg::tiled_partition<32>(block);
    int i = block.thread_rank(), value = x[i];
    y[i] = cg::reduce(half, value, cg::plus<int>());
    y[n + i] = cg::inclusive_scan(warp, value);
    y[2 * n + i] = cg::exclusive_scan(half, value, cg::bit_xor<int>());
    auto alike = cg::labeled_partition(warp, value & 3);
    y[3 * n + i] = cg::reduce(alike, value, cg::greater<int>());
    auto side = cg::binary_partition(warp, value > 0);
    y[4 * n + i] = side.size() * 100 + side.thread_rank();
    y[5 * n + i] = half.any(value > 90) + 2 * half.all(value > -95);
    y[6 * n + i] = half.match_any(value & 7);
    y[7 * n + i] = -1;
    if (value & 1) {
        auto here = cg::coalesced_threads();
        y[7 * n + i] = here.size() + 1000 * here.thread_rank() + here.shfl(value, 0);
    }
}
#endif

#ifdef PART_FRAGMENTS
#include <mma.h>
using namespace nvcuda;

// 32 x 8 sums of 16-bit elements along the depth, twice; 16 x 16 of bytes.
extern "C" __global__ void fragments(const half* a, const half* b, float* c, int depth) {
    wmma::fragment<wmma::matrix_a, 32, 8, 16, half, wmma::row_major> left;
    wmma::fragment<wmma::matrix_b, 32, 8, 16, half, wmma::col_major> right;
    wmma::fragment<wmma::accumulator, 32, 8, 16, float> sums;
    wmma::fill_fragment(sums, 0.0f);
    for (int k = 0; k < depth; k += 16) {
        wmma::load_matrix_sync(left, a + k, depth);
        wmma::load_matrix_sync(right, b + k, depth);
        wmma::mma_sync(sums, left, right, sums);
    }
    for (int i = 0; i < sums.num_elements; i++) sums.x[i] *= 2;
    wmma::store_matrix_sync(c, sums, 8, wmma::mem_row_major);
}

extern "C" __global__ void fragments_of_bytes(const signed char* a, const signed char* b, const int* c, int* d) {
    __shared__ int tile[16 * 16];
    wmma::fragment<wmma::matrix_a, 16, 16, 16, signed char, wmma::col_major> left;
    wmma::fragment<wmma::matrix_b, 16, 16, 16, signed char, wmma::row_major> right;
    wmma::fragment<wmma::accumulator, 16, 16, 16, int> sums;
    wmma::load_matrix_sync(left, a, 16);
    wmma::load_matrix_sync(right, b, 16);
    wmma::load_matrix_sync(sums, c, 16, wmma::mem_col_major);
    wmma::mma_sync(sums, left, right, sums);
    wmma::store_matrix_sync(tile, sums, 16, wmma::mem_row_major);
    __syncwarp();
    for (int i = threadIdx.x; i < 256; i += 32) d[i] = tile[i];
}
#endif

#ifdef PART_WIDE
// A product, a sum and a remainder of 128 bits: carries of additions take up those of subtractions.
extern "C" __global__ void wide(const unsigned long long* x, unsigned long long* y) {
    int i = threadIdx.x;
    unsigned __int128 value = (unsigned __int128)x[i] * x[i ^ 1] + (x[i] | 1);
    y[i * 3] = value >> 64;
    y[i * 3 + 1] = value;
    y[i * 3 + 2] = value % 1000003u;
}

extern "C" __global__ void bytes(const unsigned* x, unsigned* y) {
    int i = threadIdx.x;
    unsigned a = x[i], b = x[i ^ 1];
    y[i * 4] = __vsadu4(a, b);
    y[i * 4 + 1] = __vabsdiffu4(a, b);
    y[i * 4 + 2] = __vabsdiffs2(a, b);
    y[i * 4 + 3] = __vsads4(a, b);
}
#endif

#ifdef PART_HALVES
extern "C" __global__ void halves(const half2* x, half2* y) {
    int i = threadIdx.x;
    half2 a = x[i], b = x[i ^ 1];
    y[i * 3] = __h2div(a, __hadd2(__habs2(b), __float2half2_rn(1.0f)));
    y[i * 3 + 1] = h2exp(a);
    y[i * 3 + 2] = __hgt2(a, b);
}
#endif

#ifdef PART_STAGES
#include <cuda/pipeline>

extern "C" __global__ void stages(const float* x, float* y, int tiles) {
    constexpr int count = 3;
    __shared__ float buffer[count][128];
    __shared__ cuda::pipeline_shared_state<cuda::thread_scope_block, count> state;
    auto block = cg::this_thread_block();
    auto pipeline = cuda::make_pipeline(block, &state);
    float sum = 0;
    for (int tile = 0, next = 0; tile < tiles; tile++) {
        for (; next < tiles && next < tile + count; next++) {
            pipeline.producer_acquire();
            cuda::memcpy_async(block, buffer[next % count], x + next * 128, sizeof(float) * 128, pipeline);
            pipeline.producer_commit();
        }
        pipeline.consumer_wait();
        sum += buffer[tile % count][(threadIdx.x + 1) % 128];
        pipeline.consumer_release();
    }
    y[threadIdx.x] = sum;
}
#endif

#ifdef PART_HANDED
#include <cuda/ptx>

// Each of two blocks stores into the other's shared memory, and an mbarrier there counts the bytes.
extern "C" __global__ void __cluster_dims__(2) handed(const int* x, int* y) {
    namespace ptx = cuda::ptx;
    __shared__ __align__(16) int box[64];
    __shared__ uint64_t full;
    auto cluster = cg::this_cluster();
    int i = threadIdx.x, rank = cluster.block_rank();
    if (i == 0) {
        ptx::mbarrier_init(&full, 1);
        ptx::fence_mbarrier_init(ptx::sem_release, ptx::scope_cluster);
    }
    cluster.sync();
    if (i == 0) ptx::mbarrier_arrive_expect_tx(ptx::sem_release, ptx::scope_cluster, ptx::space_shared, &full, 64 * 4);
    ptx::st_async(cluster.map_shared_rank(box, rank ^ 1) + i, x[rank * 64 + i], cluster.map_shared_rank(&full, rank ^ 1));
    while (!ptx::mbarrier_try_wait_parity(ptx::sem_acquire, ptx::scope_cluster, &full, 0)) {}
    y[rank * 64 + i] = box[63 - i];
    cluster.sync();
}
#endif
