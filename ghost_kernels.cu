// Every hot operation on indices and votes for NVIDIA cards: what ghost_kernels.py defines, with the same bits.
//
// Compiled by NVRTC for the card at hand, from Pascal on; no headers. All that decides a vote or a move is integers, or
// float operations that are rounded one by one. A kernel works for any number of whole warps in a block, and for one thread,
// which is how the tests run this file on a CPU: elements are dealt out by thread and sums are added up at the end.

typedef unsigned int u32;
typedef unsigned short u16;
typedef short i16;
typedef signed char i8;
typedef long long i64;
typedef unsigned long long u64;

#define STRIDE 0x9E3779B1u
#define WARPS 32

template <typename T> struct alignas(16) Eight { T at[8]; };
template <typename T> struct alignas(8 * sizeof(T)) Votes { T at[8]; };

// ---------------------------------------------------------------------------------------------------------------------
// Numbers

static __device__ __forceinline__ u32 hash_of(u32 position, u32 key0, u32 key1)
{
    u32 x = position * STRIDE + key0;
    x ^= x >> 16;
    x = (x * 0x85EBCA6Bu) ^ key1;
    x ^= x >> 13;
    x *= 0xC2B2AE35u;
    return x ^ (x >> 16);
}

static __device__ __forceinline__ float as_float(float x) { return x; }
static __device__ __forceinline__ float as_float(u16 x) { return __uint_as_float((u32)x << 16); }

// Rounded to even, as torch rounds to bfloat16; NaN stays one.
static __device__ __forceinline__ u16 as_bfloat16(float x)
{
    u32 bits = __float_as_uint(x);
    return x == x ? (u16)((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16) : (u16)0x7FC0;
}
static __device__ __forceinline__ void store(float *place, float x) { *place = x; }
static __device__ __forceinline__ void store(u16 *place, float x) { *place = as_bfloat16(x); }

static __device__ __forceinline__ i64 smaller(i64 a, i64 b) { return a < b ? a : b; }
static __device__ __forceinline__ i64 larger(i64 a, i64 b) { return a > b ? a : b; }
static __device__ __forceinline__ int within(int x, int most) { return x < -most ? -most : x > most ? most : x; }

// The sum over a block's threads, for thread 0: over each warp, then over their sums in `box`, one place a warp.
template <typename T> static __device__ T block_sum(T mine, T *box)
{
    for (u32 apart = blockDim.x < 32 ? 0 : 16; apart > 0; apart /= 2)
        mine += __shfl_down_sync(0xFFFFFFFFu, mine, apart);
    if (threadIdx.x % 32 == 0)
        box[threadIdx.x / 32] = mine;
    __syncthreads();
    T sum = 0;
    if (threadIdx.x == 0)
        for (u32 warp = 0; warp < (blockDim.x + 31) / 32; warp++)
            sum += box[warp];
    __syncthreads();
    return sum;
}

// The largest number among a block's threads, for all of them.
static __device__ float block_max(float mine, float *box)
{
    for (u32 apart = blockDim.x < 32 ? 0 : 16; apart > 0; apart /= 2) {
        float other = __shfl_down_sync(0xFFFFFFFFu, mine, apart);
        mine = other > mine ? other : mine;
    }
    if (threadIdx.x % 32 == 0)
        box[threadIdx.x / 32] = mine;
    __syncthreads();
    float most = box[0];
    for (u32 warp = 1; warp < (blockDim.x + 31) / 32; warp++)
        most = box[warp] > most ? box[warp] : most;
    __syncthreads();
    return most;
}

// ---------------------------------------------------------------------------------------------------------------------
// Dequantize. Of an antisymmetric table only the magnitudes are read: 32,769 of an index, which the first cache of a
// recent card holds whole, or 513 of a word's level. (In shared memory, filled anew by each block, they cost a third
// more on an H200.)

template <typename OUT, int VOTE_BITS>
static __device__ void dequantize(const i16 *words, const float *scale, const float *magnitudes, OUT *out, u64 count,
                                  u32 columns)
{
    const bool eights = columns % 8 == 0 && (((u64)words | (u64)out) & 15) == 0;
    const u32 width = eights ? 8 : 1;
    const u32 parts = (u32)(count / width), across = columns / width;
    for (u32 part = blockIdx.x * blockDim.x + threadIdx.x; part < parts; part += gridDim.x * blockDim.x) {
        const float s = scale[part / across];
        Eight<i16> read;
        if (eights)
            read = *(const Eight<i16> *)(words + (u64)part * 8);
        else
            read.at[0] = words[part];
        Eight<OUT> written;
#pragma unroll
        for (u32 e = 0; e < 8; e++) {
            if (e < width) {
                int level = VOTE_BITS ? (read.at[e] + (1 << VOTE_BITS >> 1)) >> VOTE_BITS : read.at[e];
                float size = __ldg(magnitudes + (level < 0 ? -level : level));
                store(&written.at[e], __fmul_rn(level < 0 ? -size : size, s));
            }
        }
        if (eights)
            *(Eight<OUT> *)(out + (u64)part * 8) = written;
        else
            out[part] = written.at[0];
    }
}

#define DEQUANTIZE(NAME, OUT, VOTE_BITS)                                                                                \
    extern "C" __global__ void NAME(const i16 *words, const float *scale, const float *magnitudes, OUT *out, u64 count, \
                                    u32 columns)                                                                        \
    {                                                                                                                   \
        dequantize<OUT, VOTE_BITS>(words, scale, magnitudes, out, count, columns);                                      \
    }
DEQUANTIZE(dequantize_float32, float, 0)
DEQUANTIZE(dequantize_float32_words, float, 6)
DEQUANTIZE(dequantize_bfloat16, u16, 0)
DEQUANTIZE(dequantize_bfloat16_words, u16, 6)

// ---------------------------------------------------------------------------------------------------------------------
// Cast. A block per row. An element that is not finite casts nothing and marks its grid: the same pass with the other
// sign takes back exactly what this one cast. `control`, where given, has keys, offset and sign: a recorded launch
// reads there what changes from one replay to the next.

template <typename G, typename V>
static __device__ void cast_votes(const G *gradient, const i64 *rows, const float *yardstick, V *votes, i64 *squares,
                                  i64 *sketch, u32 columns, u32 key0, u32 key1, u32 offset, int limit, int wide,
                                  int shift, int sign, const u32 *control, int *mark)
{
    __shared__ i64 box[WARPS];
    const i64 row = rows[blockIdx.x];
    if (row < 0)
        return;
    if (control) {
        key0 = control[0];
        key1 = control[1];
        offset = control[2];
        sign = (int)control[3];
    }
    const G *read = gradient + (u64)blockIdx.x * columns;
    V *box_of_votes = votes + (u64)row * columns;
    const float y = yardstick[row], top = (float)wide;
    const int half = (1 << shift) >> 1;
    const u32 base = (u32)row * columns;
    const bool eights = columns % 8 == 0 && ((u64)read & 15) == 0 && (u64)box_of_votes % sizeof(Votes<V>) == 0;
    const u32 width = eights ? 8 : 1;
    i64 total = 0, signed_sum = 0;
    bool finite = true;
    for (u32 j = threadIdx.x * width; j < columns; j += blockDim.x * width) {
        Eight<G> g;
        Votes<V> v;
        if (eights) {
            g = *(const Eight<G> *)(read + j);
            v = *(const Votes<V> *)(box_of_votes + j);
        } else {
            g.at[0] = read[j];
            v.at[0] = box_of_votes[j];
        }
#pragma unroll
        for (u32 e = 0; e < 8; e++) {
            if (e < width) {
                float x = as_float(g.at[e]);
                bool good = fabsf(x) <= 3.402823466e38f;
                finite &= good;
                // 2^16 must not meet the yardstick first: its product may be infinite where the gradient's is not.
                float t = __fmul_rn(__fmul_rn(good ? x : 0.0f, y), 65536.0f);
                int f = __float2int_rn(fminf(fmaxf(t, -top), top));
                u32 h = hash_of(base + j + e, key0, key1);
                int vote = (within(f, limit) + (int)((h + offset) & 0xFFFFu)) >> 16;
                v.at[e] = (V)(v.at[e] - (sign < 0 ? -vote : vote));
                int q = (f + half) >> shift;
                total += (i64)q * q;
                signed_sum += (int)h < 0 ? -f : f;
            }
        }
        if (eights)
            *(Votes<V> *)(box_of_votes + j) = v;
        else
            box_of_votes[j] = v.at[0];
    }
    if (!finite && mark)
        *mark = 1;
    total = block_sum(total, box);
    signed_sum = block_sum(signed_sum, box);
    if (threadIdx.x == 0) {
        squares[row] += sign < 0 ? -total : total;
        sketch[row] += sign < 0 ? -signed_sum : signed_sum;
    }
}

#define CAST(NAME, G, V)                                                                                                \
    extern "C" __global__ void NAME(const G *gradient, const i64 *rows, const float *yardstick, V *votes,               \
                                    i64 *squares, i64 *sketch, u32 columns, u32 key0, u32 key1, u32 offset, int limit,  \
                                    int wide, int shift, int sign, const u32 *control, int *mark)                       \
    {                                                                                                                   \
        cast_votes(gradient, rows, yardstick, votes, squares, sketch, columns, key0, key1, offset, limit, wide, shift,  \
                   sign, control, mark);                                                                                \
    }
CAST(cast_float32_int8, float, i8)
CAST(cast_float32_int16, float, i16)
CAST(cast_bfloat16_int8, u16, i8)
CAST(cast_bfloat16_int16, u16, i16)

template <typename V>
static __device__ void cast_whispers(const float *gradient, const i64 *rows, const float *yardstick, int gate, V *votes,
                                     i64 *sizes, i64 *squares, u32 columns, float one, float top, int sign, int *mark)
{
    __shared__ i64 box[WARPS];
    const i64 row = rows[blockIdx.x];
    if (row < 0)
        return;
    const float *read = gradient + (u64)blockIdx.x * columns;
    V *box_of_votes = votes + (u64)row * columns;
    const float y = yardstick[row];
    i64 total = 0, squared = 0;
    bool finite = true;
    for (u32 j = threadIdx.x; j < columns; j += blockDim.x) {
        float x = read[j];
        bool good = fabsf(x) <= 3.402823466e38f;
        finite &= good;
        float t = __fmul_rn(__fmul_rn(good ? x : 0.0f, y), one);
        int f = __float2int_rn(fminf(fmaxf(t, -top), top));
        int size = f < 0 ? -f : f;
        if (size > gate)
            box_of_votes[j] = (V)(box_of_votes[j] - (f > 0 ? sign : -sign));
        total += size;
        squared += (i64)size * size;
    }
    if (!finite && mark)
        *mark = 1;
    total = block_sum(total, box);
    squared = block_sum(squared, box);
    if (threadIdx.x == 0) {
        sizes[row] += sign * total;
        squares[row] += sign * squared;
    }
}

#define WHISPER(NAME, V)                                                                                                \
    extern "C" __global__ void NAME(const float *gradient, const i64 *rows, const float *yardstick, int gate, V *votes, \
                                    i64 *sizes, i64 *squares, u32 columns, float one, float top, int sign, int *mark)   \
    {                                                                                                                   \
        cast_whispers(gradient, rows, yardstick, gate, votes, sizes, squares, columns, one, top, sign, mark);           \
    }
WHISPER(whispers_int8, i8)
WHISPER(whispers_int16, i16)

// ---------------------------------------------------------------------------------------------------------------------
// Apply

static __device__ __forceinline__ i64 fade(i64 votes, i64 decay, i64 carry, u32 draw)
{
    i64 kept = (votes * decay + (i64)(draw & 0xFFFFu)) >> 16;
    return larger(smaller(kept, carry), -carry);
}

// What the threads of a block have done to their weights, added to the whole's: integers have one sum.
static __device__ void add_counts(i64 flips, i64 travel, i64 clipped, i64 *box, u64 *counts)
{
    flips = block_sum(flips, box);
    travel = block_sum(travel, box);
    clipped = block_sum(clipped, box);
    if (threadIdx.x == 0) {
        atomicAdd(counts, (u64)flips);
        atomicAdd(counts + 1, (u64)travel);
        atomicAdd(counts + 2, (u64)clipped);
    }
}

// The largest entry not above `size`. Most weights move by less than an entry or two: the search begins at the old one,
// and only what is not found near it asks for its bucket.
static __device__ __forceinline__ u32 entry_below(i64 size, u32 near, const i64 *fixed, const int *buckets, u32 top)
{
    u32 low = near;
#pragma unroll
    for (u32 tries = 0; tries < 3; tries++) {
        if (fixed[low] > size)
            low--;
        else if (low < top && fixed[low + 1] <= size)
            low++;
        else
            return low;
    }
    u32 bucket = (u32)(size >> 25);
    low = buckets[bucket];
    u32 high = buckets[bucket + 1];
    while (low < high) {
        u32 middle = (low + high + 1) >> 1;
        if (fixed[middle] <= size)
            low = middle;
        else
            high = middle - 1;
    }
    return low;
}

template <typename V, bool WORDS>
static __device__ void apply_votes(i16 *words, V *votes, const i64 *stride, const i64 *fixed, const int *buckets,
                                   u32 columns, u32 top, int bits, u32 key0, u32 key1, u32 key2, u32 key3, i64 decay,
                                   i64 carry, i64 shrink, i64 reach, u64 *counts)
{
    __shared__ i64 box[WARPS];
    const i64 one = (i64)1 << 40;
    const u64 row = blockIdx.x;
    const i64 step = stride[row];
    const u32 base = (u32)row * columns;
    const int half = 1 << bits >> 1;
    i64 flips = 0, travel = 0, clipped = 0;
    for (u32 j = threadIdx.x; j < columns; j += blockDim.x) {
        const u64 place = row * columns + j;
        const int word = words[place];
        const int old = WORDS ? (word + half) >> bits : word;
        const i64 cast = WORDS ? word - (old << bits) : votes[place];
        const i64 m = larger(smaller(cast, reach), -reach);
        if (m == 0 && shrink == 0)
            continue;
        const u32 near = old < 0 ? -old : old;
        i64 size = fixed[near < top ? near : top];
        size -= (size * shrink) >> 32;
        const i64 start = old < 0 ? -size : size;
        const i64 wanted = start + m * step;
        const i64 target = larger(smaller(wanted, one), -one);
        size = target < 0 ? -target : target;
        const u32 low = entry_below(size, near < top ? near : top, fixed, buckets, top);
        const i64 rest = size - fixed[low];
        const i64 gap = fixed[low < top ? low + 1 : top] - fixed[low];
        const u32 draw = hash_of(base + j, key0, key1);
        int now = (int)low + ((i64)(draw >> 4) * gap < rest << 28);
        now = target < 0 ? -now : now;
        clipped += wanted != target;
        if (now != old) {
            flips++;
            travel += target > start ? target - start : start - target;
        }
        const i64 kept = m == 0 ? 0 : fade(m, decay, carry, hash_of(base + j, key2, key3));
        if (WORDS) {
            words[place] = (i16)((now << bits) + kept);
        } else {
            words[place] = (i16)now;
            votes[place] = (V)kept;
        }
    }
    add_counts(flips, travel, clipped, box, counts);
}

#define APPLY(NAME, V, WORDS)                                                                                           \
    extern "C" __global__ void NAME(i16 *words, V *votes, const i64 *stride, const i64 *fixed, const int *buckets,      \
                                    u32 columns, u32 top, int bits, u32 key0, u32 key1, u32 key2, u32 key3, i64 decay,  \
                                    i64 carry, i64 shrink, i64 reach, u64 *counts)                                      \
    {                                                                                                                   \
        apply_votes<V, WORDS>(words, votes, stride, fixed, buckets, columns, top, bits, key0, key1, key2, key3, decay,  \
                              carry, shrink, reach, counts);                                                            \
    }
APPLY(apply_int8, i8, false)
APPLY(apply_int16, i16, false)
APPLY(apply_words, i8, true)

template <typename V>
static __device__ void flip_by_majority(i16 *indices, V *votes, const i64 *stride, const i64 *fixed, u32 columns,
                                        int top, u32 key0, u32 key1, u32 key2, u32 key3, int threshold, int jitter,
                                        int chance, i64 decay, i64 carry, u64 *counts)
{
    __shared__ i64 box[WARPS];
    const u64 row = blockIdx.x;
    const i64 step = stride[row];
    const u32 base = (u32)row * columns;
    i64 flips = 0, travel = 0, clipped = 0;
    for (u32 j = threadIdx.x; j < columns; j += blockDim.x) {
        const u64 place = row * columns + j;
        const i64 m = votes[place];
        if (m == 0)
            continue;
        const u32 first = hash_of(base + j, key0, key1), second = hash_of(base + j, key2, key3);
        const i64 n = m + (((i64)(first & 0xFFFFu) * (2 * (i64)jitter + 1)) >> 16) - jitter;
        if (n != 0 && (n < 0 ? -n : n) >= threshold && (int)(first >> 16) < chance) {
            const i64 old = indices[place];
            const i64 way = (step + (i64)(second & 0xFFFFu)) >> 16;
            const i64 wanted = n > 0 ? old + way : old - way;
            const i64 now = larger(smaller(wanted, top), -(i64)top);
            clipped += wanted != now;
            if (now != old) {
                flips++;
                const i64 size = fixed[smaller(old < 0 ? -old : old, top)];
                const i64 before = old < 0 ? -size : size;
                const i64 after = now < 0 ? -fixed[-now] : fixed[now];
                travel += after > before ? after - before : before - after;
                indices[place] = (i16)now;
            }
            votes[place] = 0;
        } else {
            votes[place] = (V)fade(m, decay, carry, second >> 16);
        }
    }
    add_counts(flips, travel, clipped, box, counts);
}

#define FLIP(NAME, V)                                                                                                   \
    extern "C" __global__ void NAME(i16 *indices, V *votes, const i64 *stride, const i64 *fixed, u32 columns, int top,  \
                                    u32 key0, u32 key1, u32 key2, u32 key3, int threshold, int jitter, int chance,      \
                                    i64 decay, i64 carry, u64 *counts)                                                  \
    {                                                                                                                   \
        flip_by_majority(indices, votes, stride, fixed, columns, top, key0, key1, key2, key3, threshold, jitter,        \
                         chance, decay, carry, counts);                                                                 \
    }
FLIP(flip_int8, i8)
FLIP(flip_int16, i16)

// ---------------------------------------------------------------------------------------------------------------------
// Softmax of a slice of logits, a block per token: what sliced_softmax.py defines. Floats, equal to rounding only.

template <typename T>
static __device__ void observe(const T *logits, const i64 *targets, i64 first, float *top, float *total, float *picked,
                               u32 columns)
{
    __shared__ float box[WARPS];
    const u64 token = blockIdx.x;
    const T *row = logits + token * columns;
    const float before = top[token];
    float most = before;
    for (u32 j = threadIdx.x; j < columns; j += blockDim.x) {
        float x = as_float(row[j]);
        most = x > most ? x : most;
    }
    most = block_max(most, box);
    float sum = 0.0f;
    for (u32 j = threadIdx.x; j < columns; j += blockDim.x)
        sum += expf(as_float(row[j]) - most);
    sum = block_sum(sum, box);
    if (threadIdx.x == 0) {
        // Nothing seen before is nothing, also where all of this is minus infinity.
        float old = total[token];
        total[token] = (old == 0.0f ? 0.0f : old * expf(before - most)) + sum;
        top[token] = most;
        const i64 place = targets[token] - first;
        if (place >= 0 && place < (i64)columns)
            picked[token] = as_float(row[place]);
    }
}

// A token without a target has no gradient.
template <typename T>
static __device__ void softmax_gradient(T *logits, const i64 *targets, i64 first, const float *norm,
                                        const float *factor, u32 columns)
{
    const u64 token = blockIdx.x;
    T *row = logits + token * columns;
    const i64 target = targets[token], place = target - first;
    const float z = norm[token], f = target < 0 ? 0.0f : *factor;
    for (u32 j = threadIdx.x; j < columns; j += blockDim.x) {
        float x = expf(as_float(row[j]) - z) - ((i64)j == place ? 1.0f : 0.0f);
        store(row + j, target < 0 ? 0.0f : x * f);
    }
}

#define SOFTMAX(TYPE, T)                                                                                                \
    extern "C" __global__ void observe_##TYPE(const T *logits, const i64 *targets, i64 first, float *top, float *total, \
                                              float *picked, u32 columns)                                               \
    {                                                                                                                   \
        observe(logits, targets, first, top, total, picked, columns);                                                   \
    }                                                                                                                   \
    extern "C" __global__ void softmax_gradient_##TYPE(T *logits, const i64 *targets, i64 first, const float *norm,     \
                                                       const float *factor, u32 columns)                                \
    {                                                                                                                   \
        softmax_gradient(logits, targets, first, norm, factor, columns);                                                \
    }
SOFTMAX(float32, float)
SOFTMAX(bfloat16, u16)

// ---------------------------------------------------------------------------------------------------------------------
// The gradient of an embedding: tokens in the order of their ids, equal ones added up in the order of the text by the
// block of the first; the other blocks have nothing to say (row -1). So the result has a fixed shape and order.

extern "C" __global__ void gather_rows(const float *gradient, const i64 *order, const i64 *sorted, float *summed,
                                       i64 *rows, u32 tokens, u32 columns)
{
    const u32 b = blockIdx.x;
    const i64 id = sorted[b];
    const bool begins = b == 0 || sorted[b - 1] != id;
    if (threadIdx.x == 0)
        rows[b] = begins ? id : -1;
    if (!begins)
        return;
    for (u32 j = threadIdx.x; j < columns; j += blockDim.x) {
        float sum = 0.0f;
        for (u32 k = b; k < tokens && sorted[k] == id; k++)
            sum += gradient[(u64)order[k] * columns + j];
        summed[(u64)b * columns + j] = sum;
    }
}
