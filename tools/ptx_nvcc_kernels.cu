// Kernels in CUDA C++ whose PTX, made by nvcc, the emulator must run (see make_ptx_data.py). One part is compiled at a
// time, for one level:
// part reduce sm_80
// part math sm_80
// part integers sm_80
// part halves sm_90
// part pipeline sm_80
// part cluster sm_90
// part bulk sm_90
// part grid sm_80
#include <cooperative_groups.h>
#include <cooperative_groups/reduce.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <cuda_pipeline.h>
#include <cuda/barrier>

#include <cstdint>

namespace cg = cooperative_groups;

#ifdef PART_REDUCE
// Sum of x by shuffles, shared memory and one atomic of each block; a histogram in shared memory; a ballot compaction.
extern "C" __global__ void reduce(const float* x, float* total, int n) {
    __shared__ float partial[32];
    float sum = 0;
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) sum += x[i];
    for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_down_sync(0xffffffffu, sum, offset);
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = sum;
    __syncthreads();
    if (threadIdx.x < 32) {
        sum = threadIdx.x < blockDim.x / 32 ? partial[threadIdx.x] : 0.0f;
        for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
        if (threadIdx.x == 0) atomicAdd(total, sum);
    }
}

extern "C" __global__ void histogram(const unsigned char* x, unsigned* bins, int n) {
    __shared__ unsigned local[256];
    for (int i = threadIdx.x; i < 256; i += blockDim.x) local[i] = 0;
    __syncthreads();
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) atomicAdd(&local[x[i]], 1u);
    __syncthreads();
    for (int i = threadIdx.x; i < 256; i += blockDim.x) atomicAdd(&bins[i], local[i]);
}

extern "C" __global__ void compact(const int* x, int* out, int* count, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    bool keep = i < n && x[i] > 0;
    unsigned mask = __ballot_sync(0xffffffffu, keep);
    int lane = threadIdx.x % 32, base = 0;
    if (lane == 0) base = atomicAdd(count, __popc(mask));
    base = __shfl_sync(0xffffffffu, base, 0);
    if (keep) out[base + __popc(mask & ((1u << lane) - 1))] = x[i];
}

__device__ __noinline__ unsigned step(unsigned value) { return value % 2 ? 3 * value + 1 : value / 2; }

// Threads that leave loops at different times, a switch, and a function that is called.
extern "C" __global__ void collatz(const unsigned* x, unsigned* steps, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    unsigned value = x[i], count = 0;
    while (value != 1) {
        value = step(value);
        ++count;
        if (count > 200) break;
    }
    switch (count % 4) {
        case 0: count += 1000; break;
        case 1: count *= 3; break;
        case 2: count ^= 0x55; break;
        default: break;
    }
    steps[i] = count;
}
#endif

#ifdef PART_MATH
extern "C" __global__ void functions(const float* x, float* y, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    float a = x[i];
    float* out = y + 14 * i;
    out[0] = expf(a);
    out[1] = logf(fabsf(a));
    out[2] = sinf(a);
    out[3] = cosf(a * 1e6f);
    out[4] = tanhf(a);
    out[5] = erff(a);
    out[6] = powf(fabsf(a), 1.7f);
    out[7] = a / (a * a + 0.3f);
    out[8] = sqrtf(fabsf(a));
    out[9] = rsqrtf(fabsf(a));
    out[10] = fmaf(a, a, -1.0f);
    out[11] = rintf(a * 10);
    out[12] = __expf(a);
    out[13] = fmodf(a * 100, 0.7f);
}

extern "C" __global__ void doubles(const double* x, double* y, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    double a = x[i];
    double* out = y + 5 * i;
    out[0] = exp(a);
    out[1] = log(fabs(a));
    out[2] = sin(a * 1e12);
    out[3] = sqrt(fabs(a)) / (a * a + 0.1);
    out[4] = fma(a, a, -1.0);
}
#endif

#ifdef PART_INTEGERS
extern "C" __global__ void integers(const unsigned* x, unsigned* y, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    unsigned a = x[2 * i], b = x[2 * i + 1];
    unsigned* out = y + 24 * i;
    out[0] = __popc(a);
    out[1] = __clz(a);
    out[2] = __brev(a);
    out[3] = __ffs(a);
    out[4] = __byte_perm(a, b, 0x5140);
    out[5] = __funnelshift_l(a, b, b & 31);
    out[6] = __funnelshift_rc(a, b, b & 63);
    out[7] = __umulhi(a, b);
    out[8] = (unsigned)__mulhi((int)a, (int)b);
    out[9] = (unsigned)__dp4a((int)a, (int)b, 7);
    out[10] = __dp4a(a, b, 7u);
    out[11] = a / (b | 1);
    out[12] = (unsigned)((int)a % (int)(b | 1));
    out[13] = __usad(a, b, 3u);
    out[14] = (unsigned)((long long)(int)a * (int)b >> 13);
    out[15] = (unsigned)(((unsigned long long)a << 32 | b) / 1000003u);
    out[16] = (a & b) ^ (~a | 0x1234);
    out[17] = (unsigned)max((int)a, min((int)b, 100));
    out[18] = (unsigned)((int)a >> (b & 31));
    out[19] = __vadd4(a, b);
    out[20] = __float_as_uint((float)a);
    out[21] = (unsigned)(int)(__uint_as_float(b & 0x7fffffff) * 0.5f);
    out[22] = (unsigned)__popcll((unsigned long long)a << 32 | b);
    out[23] = (unsigned)(signed char)(a >> 8) + (unsigned short)b;
}
#endif

#ifdef PART_HALVES
extern "C" __global__ void halves(const float* x, float* y, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    float a = x[2 * i], b = x[2 * i + 1];
    float* out = y + 14 * i;
    __half2 h = __floats2half2_rn(a, b), g = __hfma2(h, h, __float2half2_rn(0.5f));
    out[0] = __low2float(g);
    out[1] = __high2float(g);
    __nv_bfloat162 p = __floats2bfloat162_rn(a, b), q = __hfma2(p, p, __float2bfloat162_rn(0.5f));
    out[2] = __low2float(q);
    out[3] = __high2float(q);
    out[4] = __half2float(__hadd(__float2half(a), __float2half(b)));
    out[5] = __bfloat162float(__hmul(__float2bfloat16(a), __float2bfloat16(b)));
    out[6] = __half2float(__hmax(__low2half(h), __high2half(h)));
    out[7] = __half2float(hexp2(__float2half(a)));
    __nv_fp8_e4m3 e(a);
    __nv_fp8_e5m2 f(b);
    out[8] = (float)e;
    out[9] = (float)f;
    out[10] = __half2float(__float2half_rz(a));
    out[11] = __bfloat162float(__float2bfloat16_rd(a));
    out[12] = __hgt(__float2half(a), __float2half(b)) ? 1.0f : 0.0f;
    out[13] = (float)__half2int_rn(__float2half(a * 10));
}
#endif

#ifdef PART_PIPELINE
// y = x * 2 + 1 over tiles copied with two stages of cp.async; and the same with a block-wide mbarrier.
extern "C" __global__ void pipeline(const float4* x, float4* y, int tiles) {
    __shared__ float4 stage[2][128];
    __pipeline_memcpy_async(&stage[0][threadIdx.x], &x[threadIdx.x], sizeof(float4));
    __pipeline_commit();
    for (int tile = 0; tile < tiles; ++tile) {
        if (tile + 1 < tiles)
            __pipeline_memcpy_async(&stage[(tile + 1) & 1][threadIdx.x], &x[(tile + 1) * 128 + threadIdx.x], sizeof(float4));
        __pipeline_commit();
        __pipeline_wait_prior(1);
        __syncthreads();
        float4 value = stage[tile & 1][threadIdx.x ^ 1];
        y[tile * 128 + (threadIdx.x ^ 1)] =
            make_float4(value.x * 2 + 1, value.y * 2 + 1, value.z * 2 + 1, value.w * 2 + 1);
        __syncthreads();
    }
}

extern "C" __global__ void barriers(const int* x, int* y, int rounds) {
    __shared__ cuda::barrier<cuda::thread_scope_block> barrier;
    __shared__ int values[128];
    if (threadIdx.x == 0) init(&barrier, blockDim.x);
    __syncthreads();
    int value = x[threadIdx.x];
    for (int round = 0; round < rounds; ++round) {
        values[threadIdx.x] = value;
        barrier.arrive_and_wait();
        value += values[(threadIdx.x + 1) % 128];
        barrier.arrive_and_wait();
    }
    y[threadIdx.x] = value;
}
#endif

#ifdef PART_CLUSTER
// Each block of a cluster of four publishes its sum in its own shared memory, and adds up those of all.
extern "C" __global__ void __cluster_dims__(4) cluster_sum(const int* x, int* y) {
    cg::cluster_group cluster = cg::this_cluster();
    __shared__ int sum;
    if (threadIdx.x == 0) sum = 0;
    __syncthreads();
    atomicAdd(&sum, x[blockIdx.x * blockDim.x + threadIdx.x]);
    cluster.sync();
    if (threadIdx.x == 0) {
        int total = 0;
        for (unsigned rank = 0; rank < cluster.num_blocks(); ++rank) total += *cluster.map_shared_rank(&sum, rank);
        y[blockIdx.x] = total;
    }
    cluster.sync();
}
#endif

#ifdef PART_BULK
// Contiguous rows come by bulk copies that report to an mbarrier, and go back by bulk stores.
extern "C" __global__ void bulk(const int* x, int* y, int rounds) {
    __shared__ alignas(128) int row[256];
    __shared__ cuda::barrier<cuda::thread_scope_block> barrier;
    if (threadIdx.x == 0) {
        init(&barrier, blockDim.x);
        cuda::device::experimental::fence_proxy_async_shared_cta();
    }
    __syncthreads();
    for (int round = 0; round < rounds; ++round) {
        cuda::barrier<cuda::thread_scope_block>::arrival_token token;
        if (threadIdx.x == 0) {
            cuda::device::experimental::cp_async_bulk_global_to_shared(row, x + round * 256, sizeof(row), barrier);
            token = cuda::device::barrier_arrive_tx(barrier, 1, sizeof(row));
        } else {
            token = barrier.arrive();
        }
        barrier.wait(std::move(token));
        for (int i = threadIdx.x; i < 256; i += blockDim.x) row[i] = row[i] * 3 + round;
        cuda::device::experimental::fence_proxy_async_shared_cta();
        __syncthreads();
        if (threadIdx.x == 0) {
            cuda::device::experimental::cp_async_bulk_shared_to_global(y + round * 256, row, sizeof(row));
            cuda::device::experimental::cp_async_bulk_commit_group();
            cuda::device::experimental::cp_async_bulk_wait_group_read<0>();
        }
        __syncthreads();
    }
}
#endif

#ifdef PART_GRID
// Two phases with a barrier of the whole grid between: atomics, fences and a spin.
extern "C" __global__ void grid_barrier(const int* x, int* middle, int* y, unsigned* arrived) {
    int i = blockIdx.x * blockDim.x + threadIdx.x, n = gridDim.x * blockDim.x;
    middle[i] = x[i] * 2;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        __threadfence();
        atomicAdd(arrived, 1u);
        while (*(volatile unsigned*)arrived < gridDim.x) {}
        __threadfence();
    }
    __syncthreads();
    y[i] = middle[(i + blockDim.x) % n] + 1;
}
#endif
