// A token of each row of logits: jamba_core::Choice::sample, which is the definition.
//
// sample_parts    of every part of COLS columns: bias and penalties, the best score, and what the
//                 logarithm of a probability needs
// sample_weights  of rows that draw: e^((score - best) / temperature), summed by part or by bin
// sample          filters, and finds the token
//
// Weights are those of the host to the bit. They are summed as whole numbers of 2^-FRACTION, in any
// order the same sum, where the host sums f64: a token may be another where the draw, or what
// top_p keeps, is within 2^-FRACTION per token of a boundary.
//
// Rank is by falling score, then by id: a key of 64 bits has the complement of the score in its upper
// half, so that it ascends. Every filter keeps the keys up to one of them, and the draw is one: all
// are the first key with which a count or a sum reaches a target (`find`). Its bin is found among
// BINS of equal width in score, then its keys are sorted; bins with more than LIST keys (equal or
// nearly equal scores) are divided again by key.
//
// Layout: x (all rows, cols) f32, of which row[r].row is chosen from; scores (rows, cols), of rows
// with edits; part, part_sums (rows, parts); counts, sums (rows, BINS); chosen (rows).
// Threads: a block per row and part; then a block per row.

struct Row {
    double uniform;
    float temperature, top_p, min_p;
    float repetition, presence, frequency;
    u32 top_k;  // 0 for all
    u32 row;
    u32 bias, bias_end;    // entries of `edits`: id and what is added, by ascending id
    u32 known, known_end;  // id and how many times it was generated
    u32 unused[2];
};

struct Chosen {
    u32 id;  // FULL where the host is to say why
    float logprob;
};

// Of the logits, the largest and the sum of exp(x - largest); the best score and its column.
struct Part {
    float largest, sum, best;
    u32 at, unusable;
};

struct SampleArgs {
    const float* x;
    float* scores;
    Part* part;
    u64* part_sums;
    u32* counts;
    u64* sums;
    Chosen* chosen;
    const Row* row;
    const uint2* edits;
    u32 cols, parts;
};

#define COLS 2048
#define THREADS 256  // of sample_parts and sample_weights
#define WARPS (THREADS / 32)
#define HELD (COLS / THREADS)
#define BINS 2048
#define BINS_PER_UNIT 64.0f  // of (best - score) / temperature
#define LIST 1024            // threads of sample, too
#define FRACTION 44          // e^-30.5 is less: beyond bin 1,952 all weights are 0

__device__ __forceinline__ void keep_better(float& value, u32& at, float other, u32 other_at) {
    if (other > value || (other == value && other_at < at)) value = other, at = other_at;
}

// The best of a warp, in all of its threads.
__device__ __forceinline__ void warp_best(float& value, u32& at) {
#pragma unroll
    for (int mask = 16; mask > 0; mask >>= 1) {
        keep_better(value, at, __shfl_xor_sync(FULL, value, mask), __shfl_xor_sync(FULL, at, mask));
    }
}

__device__ __forceinline__ bool is_edited(const Row& row) {
    return row.bias < row.bias_end || row.known < row.known_end;
}
__device__ __forceinline__ bool is_ranked(const Row& row, u32 cols) {
    return (row.top_k > 0 && row.top_k < cols) || row.top_p < 1.0f;
}
__device__ __forceinline__ const float* scores_of(const SampleArgs& a, const Row& row, u32 r) {
    return is_edited(row) ? a.scores + (u64)r * a.cols : a.x + (u64)row.row * a.cols;
}

__device__ __forceinline__ float bounded(double score) {
    const float v = __double2float_rn(score), most = __uint_as_float(0x7f7fffff);
    return score == -(double)INFINITY_F ? -INFINITY_F : fminf(fmaxf(v, -most), most);
}

// e^x for x <= 0: `exp` of jamba_core::sampler, operation by operation.
__device__ __forceinline__ float exp_host(float x) {
    const float whole = 12582912.0f, clamped = x < -87.0f ? -87.0f : x;
    const float shifted = __fadd_rn(__fmul_rn(clamped, 1.44269504088896340736f), whole);
    const float n = __fsub_rn(shifted, whole);
    const float r = __fsub_rn(__fsub_rn(clamped, __fmul_rn(n, 0.6933594f)),
                              __fmul_rn(n, -2.1219444e-4f));
    const float terms[7] = {1.0f / 720.0f, 1.0f / 120.0f, 1.0f / 24.0f, 1.0f / 6.0f,
                            0.5f,          1.0f,          1.0f};
    float p = 1.0f / 5040.0f;
#pragma unroll
    for (int i = 0; i < 7; ++i) p = __fadd_rn(__fmul_rn(p, r), terms[i]);
    return x < -87.0f ? 0.0f : __fmul_rn(p, __uint_as_float((__float_as_uint(shifted) + 127) << 23));
}

// Weights of a row, and the bins of its scores.
struct Weights {
    float best, temperature, scale;

    __device__ __forceinline__ Weights(float best, float temperature)
        : best(best), temperature(temperature), scale(BINS_PER_UNIT / temperature) {}
    // In 2^-FRACTION; 0 below `least`.
    __device__ __forceinline__ u64 weight(float score, float least) const {
        const float w = exp_host(__fdiv_rn(__fsub_rn(score, best), temperature));
        return w < least ? 0 : (u64)__fmul_rn(w, (float)(1ull << FRACTION));
    }
    // Of equal width, the best first; all that is far off is in the last. Never falls with rank.
    __device__ __forceinline__ u32 bin(float score) const {
        return min((u32)__fmul_rn(__fsub_rn(best, score), scale), BINS - 1);
    }
};

__device__ __forceinline__ u64 key_of(float score, u32 id) {
    const u32 bits = __float_as_uint(score + 0.0f);  // -0 as 0
    return (u64)(bits >> 31 ? bits : bits ^ 0x7fffffffu) << 32 | id;
}
__device__ __forceinline__ float score_of(u64 key) {
    const u32 bits = (u32)(key >> 32);
    return __uint_as_float(bits >> 31 ? bits : bits ^ 0x7fffffffu);
}

// Adds to a sum of two words.
__device__ __forceinline__ void add_shared(u32* low, u32* high, u64 v) {
    const u32 carry = atomicAdd(low, (u32)v) + (u32)v < (u32)v;
    const u32 upper = (u32)(v >> 32) + carry;
    if (upper) atomicAdd(high, upper);
}

__device__ __forceinline__ u64 warp_sum_u64(u64 v) {
#pragma unroll
    for (int mask = 16; mask > 0; mask >>= 1) v += __shfl_xor_sync(FULL, v, mask);
    return v;
}

// The best score of a row, its column, and whether a logit is not finite; all threads of a block.
__device__ __forceinline__ bool best_of_parts(const SampleArgs& a, u32 r, float& best, u32& at) {
    const Part* parts = a.part + (u64)r * a.parts;
    int unusable = 0;
    best = -INFINITY_F, at = FULL;
    for (u32 p = threadIdx.x % 32; p < a.parts; p += 32) {
        unusable |= parts[p].unusable != 0;
        keep_better(best, at, parts[p].best, parts[p].at);
    }
    warp_best(best, at);
    return !__any_sync(FULL, unusable) && best > -INFINITY_F;
}

extern "C" __global__ void __launch_bounds__(THREADS) sample_parts(const SampleArgs a) {
    __shared__ float values[WARPS], sums[WARPS], scores[COLS];
    __shared__ u32 places[WARPS];
    let_next_begin();
    await_inputs();
    const Row& row = a.row[blockIdx.x];
    const float* logits = a.x + (u64)row.row * a.cols;
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32, first = blockIdx.y * COLS;
    // What sample_weights adds to.
    for (u32 bin = blockIdx.y * THREADS + threadIdx.x; bin < BINS; bin += a.parts * THREADS) {
        a.counts[(u64)blockIdx.x * BINS + bin] = 0;
        a.sums[(u64)blockIdx.x * BINS + bin] = 0;
    }
    float x[HELD], largest = -INFINITY_F;
    int unusable = 0;
#pragma unroll
    for (u32 k = 0; k < HELD; ++k) {
        const u32 c = first + k * THREADS + threadIdx.x;
        x[k] = c < a.cols ? logits[c] : -INFINITY_F;
    }
#pragma unroll
    for (u32 k = 0; k < HELD; ++k) {
        const u32 c = first + k * THREADS + threadIdx.x;
        unusable |= c < a.cols && !(fabsf(x[k]) < INFINITY_F);
        largest = fmaxf(largest, x[k]);
        scores[k * THREADS + threadIdx.x] = x[k];
    }
    largest = warp_max(largest);
    if (lane == 0) values[warp] = largest;
    unusable = __syncthreads_or(unusable);
    for (u32 w = 0; w < WARPS; ++w) largest = fmaxf(largest, values[w]);
    float sum = 0.0f;
#pragma unroll
    for (u32 k = 0; k < HELD; ++k) sum += expf(x[k] - largest);
    sum = warp_sum(sum);
    if (lane == 0) sums[warp] = sum;

    if (is_edited(row)) {
        // Entries of one token are beside each other, and the thread of the first adds all.
        for (u32 e = row.bias + threadIdx.x; e < row.bias_end; e += THREADS) {
            const u32 id = a.edits[e].x;
            if (id - first >= COLS || (e > row.bias && a.edits[e - 1].x == id)) continue;
            float score = scores[id - first];
            for (u32 i = e; i < row.bias_end && a.edits[i].x == id; ++i) {
                score = bounded(__dadd_rn(score, __uint_as_float(a.edits[i].y)));
            }
            scores[id - first] = score;
        }
        __syncthreads();
        for (u32 e = row.known + threadIdx.x; e < row.known_end; e += THREADS) {
            const u32 id = a.edits[e].x, count = a.edits[e].y;
            if (id - first >= COLS) continue;
            double score = scores[id - first];
            score = score > 0.0 ? __ddiv_rn(score, row.repetition) : __dmul_rn(score, row.repetition);
            if (count > 0) {
                score = __dsub_rn(score, row.presence);
                score = __dsub_rn(score, __dmul_rn(row.frequency, count));
            }
            scores[id - first] = bounded(score);
        }
        __syncthreads();
        float* out = a.scores + (u64)blockIdx.x * a.cols;
        for (u32 c = threadIdx.x; c < COLS && first + c < a.cols; c += THREADS) {
            out[first + c] = scores[c];
        }
    }
    __syncthreads();
    float best = -INFINITY_F;
    u32 at = FULL;
#pragma unroll
    for (u32 k = 0; k < HELD; ++k) {
        const u32 c = k * THREADS + threadIdx.x;
        if (first + c < a.cols) keep_better(best, at, scores[c], first + c);
    }
    warp_best(best, at);
    if (lane == 0) values[warp] = best, places[warp] = at;
    __syncthreads();
    if (threadIdx.x != 0) return;
    for (u32 w = 1; w < WARPS; ++w) keep_better(best, at, values[w], places[w]);
    sum = 0.0f;
    for (u32 w = 0; w < WARPS; ++w) sum += sums[w];
    a.part[(u64)blockIdx.x * a.parts + blockIdx.y] = Part{largest, sum, best, at, (u32)unusable};
}

extern "C" __global__ void __launch_bounds__(THREADS) sample_weights(const SampleArgs a) {
    __shared__ u32 counts[BINS], low[BINS], high[BINS];
    __shared__ u64 sums[WARPS];
    let_next_begin();
    await_inputs();
    const Row& row = a.row[blockIdx.x];
    float best;
    u32 at;
    if (row.temperature == 0.0f || !best_of_parts(a, blockIdx.x, best, at)) return;
    const Weights weights(best, row.temperature);
    const float* scores = scores_of(a, row, blockIdx.x);
    const u32 first = blockIdx.y * COLS;
    float x[HELD];
#pragma unroll
    for (u32 k = 0; k < HELD; ++k) {
        const u32 c = first + k * THREADS + threadIdx.x;
        x[k] = c < a.cols ? scores[c] : -INFINITY_F;
    }
    if (!is_ranked(row, a.cols)) {
        u64 sum = 0;
#pragma unroll
        for (u32 k = 0; k < HELD; ++k) sum += weights.weight(x[k], row.min_p);
        sum = warp_sum_u64(sum);
        if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
        __syncthreads();
        if (threadIdx.x != 0) return;
        for (u32 w = 1; w < WARPS; ++w) sum += sums[w];
        a.part_sums[(u64)blockIdx.x * a.parts + blockIdx.y] = sum;
        return;
    }
    for (u32 bin = threadIdx.x; bin < BINS; bin += THREADS) counts[bin] = low[bin] = high[bin] = 0;
    __syncthreads();
#pragma unroll
    for (u32 k = 0; k < HELD; ++k) {
        if (first + k * THREADS + threadIdx.x >= a.cols) continue;
        const u32 bin = weights.bin(x[k]);
        atomicAdd(counts + bin, 1);
        add_shared(low + bin, high + bin, weights.weight(x[k], 0.0f));
    }
    __syncthreads();
    for (u32 bin = threadIdx.x; bin < BINS; bin += THREADS) {
        if (counts[bin] == 0) continue;
        const u64 at = (u64)blockIdx.x * BINS + bin;
        atomicAdd(a.counts + at, counts[bin]);
        atomicAdd(a.sums + at, (u64)high[bin] << 32 | low[bin]);
    }
}

// What the threads of `sample` share.
struct Shared {
    u32 counts[BINS], low[BINS], high[BINS];
    u64 list[LIST];
    u64 scan[LIST / 32 + 1];
    u64 found, before;
    u32 length;
};

// The sum up to and with the value of this thread, over the block; and that of all.
__device__ __forceinline__ u64 block_scan(Shared& s, u64 v, u64& total) {
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
    for (u32 step = 1; step < 32; step *= 2) {
        const u64 other = __shfl_up_sync(FULL, v, step);
        if (lane >= step) v += other;
    }
    __syncthreads();
    if (lane == 31) s.scan[warp] = v;
    __syncthreads();
    u64 before = 0;
    total = 0;
    for (u32 w = 0; w < LIST / 32; ++w) {
        if (w < warp) before += s.scan[w];
        total += s.scan[w];
    }
    return before + v;
}

// A row whose candidates are the keys up to `last`, with weights of at least `least`.
struct Ranking {
    const float* scores;
    u32 cols;
    Weights weights;
    u64 last;
    float least;
    // Whether the bins of the shared memory are those of the scores.
    bool is_binned;

    // Calls f(key, bin of the score) for all candidates.
    template <class F>
    __device__ __forceinline__ void for_each(F f) const {
        for (u32 base = 0; base < cols; base += 8 * LIST) {
            float x[8];
#pragma unroll
            for (u32 k = 0; k < 8; ++k) {
                const u32 c = base + k * LIST + threadIdx.x;
                if (c < cols) x[k] = scores[c];
            }
#pragma unroll
            for (u32 k = 0; k < 8; ++k) {
                const u32 c = base + k * LIST + threadIdx.x;
                if (c >= cols) continue;
                const u64 key = key_of(x[k], c);
                if (key <= last) f(key, weights.bin(x[k]));
            }
        }
    }

    __device__ __forceinline__ void clear(Shared& s) const {
        __syncthreads();
        for (u32 bin = threadIdx.x; bin < BINS; bin += LIST) {
            s.counts[bin] = s.low[bin] = s.high[bin] = 0;
        }
        __syncthreads();
    }

    __device__ __forceinline__ void add(Shared& s, u32 bin, u64 key) const {
        atomicAdd(s.counts + bin, 1);
        add_shared(s.low + bin, s.high + bin, weights.weight(score_of(key), least));
    }

    // Fills the bins, where they are not those of the candidates.
    __device__ void bins(Shared& s) {
        if (is_binned) return;
        clear(s);
        for_each([&](u64 key, u32 bin) { add(s, bin, key); });
        __syncthreads();
        is_binned = true;
    }

    __device__ __forceinline__ u64 measure(const Shared& s, u32 bin, bool by_count) const {
        return by_count ? s.counts[bin] : (u64)s.high[bin] << 32 | s.low[bin];
    }

    // The sum of all weights.
    __device__ u64 total(Shared& s) {
        bins(s);
        u64 all;
        block_scan(s, measure(s, 2 * threadIdx.x, false) + measure(s, 2 * threadIdx.x + 1, false), all);
        return all;
    }

    // The bin in which the sum of a measure reaches `target`, from which all before is taken. There
    // is one.
    __device__ u32 reach(Shared& s, u64& target, bool by_count) const {
        const u64 one = measure(s, 2 * threadIdx.x, by_count);
        const u64 two = measure(s, 2 * threadIdx.x + 1, by_count);
        u64 all;
        const u64 end = block_scan(s, one + two, all), start = end - one - two;
        if (start < target && target <= end) {
            const bool second = start + one < target;
            s.found = 2 * threadIdx.x + second;
            s.before = second ? start + one : start;
        }
        __syncthreads();
        const u32 bin = (u32)s.found;
        target -= s.before;
        __syncthreads();
        return bin;
    }

    // Cuts off all candidates after the first with which their count, or the sum of their weights,
    // reaches `target`.
    __device__ void cut(Shared& s, u64 target, bool by_count) {
        bins(s);
        const u32 coarse = reach(s, target, by_count);
        // What is that far off has no weight, and how much of it remains makes no difference.
        if (coarse == BINS - 1) return;
        u32 count = s.counts[coarse];
        u64 from = 0, to = ~0ull;  // keys of the bin, if it was divided
        if (count > LIST) {
            is_binned = false;
            u64 least_key = ~0ull, largest_key = 0;
            for_each([&](u64 key, u32 bin) {
                if (bin == coarse) least_key = min(least_key, key), largest_key = max(largest_key, key);
            });
            __syncthreads();
            if (threadIdx.x == 0) s.found = ~0ull, s.before = 0;
            __syncthreads();
            atomicMin(&s.found, least_key);
            atomicMax(&s.before, largest_key);
            __syncthreads();
            from = s.found, to = s.before;
            while (count > LIST) {
                const int shift = max(0, 64 - __clzll(to - from) - 11);
                clear(s);
                for_each([&](u64 key, u32) {
                    if (from <= key && key <= to) add(s, (u32)((key - from) >> shift), key);
                });
                __syncthreads();
                const u32 bin = reach(s, target, by_count);
                count = s.counts[bin];
                from += (u64)bin << shift;
                to = min(to, from + ((1ull << shift) - 1));
            }
        }
        if (threadIdx.x == 0) s.length = 0;
        __syncthreads();
        const bool is_divided = !is_binned;
        for_each([&](u64 key, u32 bin) {
            const bool is_in = is_divided ? from <= key && key <= to : bin == coarse;
            if (is_in) s.list[atomicAdd(&s.length, 1)] = key;
        });
        __syncthreads();
        sort(s, count);
        const u64 key = s.list[threadIdx.x];
        const u64 own = threadIdx.x < count ? weights.weight(score_of(key), least) : 0;
        u64 all;
        const u64 end = block_scan(s, own, all), start = end - own;
        const bool is_found = by_count ? threadIdx.x + 1 == target : start < target && target <= end;
        if (is_found) {
            s.found = key;
            // What remains of the bin.
            s.counts[coarse] = threadIdx.x + 1;
            s.low[coarse] = (u32)end, s.high[coarse] = (u32)(end >> 32);
        }
        for (u32 bin = threadIdx.x; bin < BINS; bin += LIST) {
            if (bin > coarse) s.counts[bin] = s.low[bin] = s.high[bin] = 0;
        }
        __syncthreads();
        last = s.found;
        __syncthreads();
    }

    // Sorts the list; what is beyond `count` becomes the largest key.
    __device__ void sort(Shared& s, u32 count) const {
        if (threadIdx.x >= count) s.list[threadIdx.x] = ~0ull;
        __syncthreads();
        for (u32 size = 2; size < 2 * count; size *= 2) {
            for (u32 stride = size / 2; stride > 0; stride /= 2) {
                const u32 i = threadIdx.x, j = i ^ stride;
                if (i < j) {
                    const u64 a = s.list[i], b = s.list[j];
                    if (a > b == ((i & size) == 0)) s.list[i] = b, s.list[j] = a;
                }
                __syncthreads();
            }
        }
    }
};

// The whole number that a sum is to reach so that it is at least, or exceeds, a share of the total.
__device__ __forceinline__ u64 at_least(double share, u64 total) {
    return min(total, max(1ull, (u64)ceil(share * (double)total)));
}
__device__ __forceinline__ u64 beyond(double share, u64 total) {
    return min(total, (u64)(share * (double)total) + 1);
}

// The token at the draw, by ascending id.
__device__ u32 draw_by_id(const SampleArgs& a, const Row& row, const Weights& weights, Shared& s) {
    const u64* sums = a.part_sums + (u64)blockIdx.x * a.parts;
    if (threadIdx.x == 0) {
        u64 total = 0;
        for (u32 p = 0; p < a.parts; ++p) total += sums[p];
        u64 target = beyond(row.uniform, total);
        u32 part = 0;
        while (target > sums[part]) target -= sums[part++];
        s.length = part, s.before = target;
    }
    __syncthreads();
    const u32 c = s.length * COLS + 2 * threadIdx.x;
    const u64 target = s.before;
    const float* scores = scores_of(a, row, blockIdx.x);
    const u64 one = c < a.cols ? weights.weight(scores[c], row.min_p) : 0;
    const u64 two = c + 1 < a.cols ? weights.weight(scores[c + 1], row.min_p) : 0;
    u64 all;
    const u64 end = block_scan(s, one + two, all), start = end - one - two;
    if (start < target && target <= end) s.found = start + one < target ? c + 1 : c;
    __syncthreads();
    return (u32)s.found;
}

// The token at the draw, by rank, of those that the filters leave.
__device__ u32 draw_by_rank(const SampleArgs& a, const Row& row, const Weights& weights, Shared& s) {
    Ranking ranking{scores_of(a, row, blockIdx.x), a.cols, weights, ~0ull, 0.0f, true};
    for (u32 bin = threadIdx.x; bin < BINS; bin += LIST) {
        const u64 at = (u64)blockIdx.x * BINS + bin, sum = a.sums[at];
        s.counts[bin] = a.counts[at], s.low[bin] = (u32)sum, s.high[bin] = (u32)(sum >> 32);
    }
    __syncthreads();
    if (row.top_k > 0 && row.top_k < a.cols) ranking.cut(s, row.top_k, true);
    if (row.top_p < 1.0f) ranking.cut(s, at_least(row.top_p, ranking.total(s)), false);
    if (row.min_p > 0.0f) ranking.least = row.min_p, ranking.is_binned = false;
    ranking.cut(s, beyond(row.uniform, ranking.total(s)), false);
    return (u32)ranking.last;
}

extern "C" __global__ void __launch_bounds__(LIST) sample(const SampleArgs a) {
    __shared__ Shared s;
    let_next_begin();
    await_inputs();
    const Row& row = a.row[blockIdx.x];
    float best;
    u32 id;
    if (!best_of_parts(a, blockIdx.x, best, id)) {
        if (threadIdx.x == 0) a.chosen[blockIdx.x] = Chosen{FULL, 0.0f};
        return;
    }
    if (row.temperature > 0.0f) {
        const Weights weights(best, row.temperature);
        id = is_ranked(row, a.cols) ? draw_by_rank(a, row, weights, s)
                                    : draw_by_id(a, row, weights, s);
    }
    if (threadIdx.x >= 32) return;
    const Part* parts = a.part + (u64)blockIdx.x * a.parts;
    float largest = -INFINITY_F, sum = 0.0f;
    for (u32 p = threadIdx.x; p < a.parts; p += 32) largest = fmaxf(largest, parts[p].largest);
    largest = warp_max(largest);
    for (u32 p = threadIdx.x; p < a.parts; p += 32) {
        sum += parts[p].sum * expf(parts[p].largest - largest);
    }
    sum = warp_sum(sum);
    if (threadIdx.x == 0) {
        a.chosen[blockIdx.x] = Chosen{id, a.x[(u64)row.row * a.cols + id] - largest - logf(sum)};
    }
}
