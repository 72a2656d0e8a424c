/* The transforms of nn/winograd_transforms.py in one pass over the maps, for float and double.

   Maps are contiguous [B, H, W, C]; `places` is [36, tiles, width], numbered column by column, of the tiles of samples
   first..end and rows of tiles top..bottom. Each function goes along one side of the tiles into `scratch`, then along
   the other. Inner loops run over channels, or over channels of neighbouring positions. */

#ifndef REAL
#include <stddef.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#define THREAD omp_get_thread_num()
#else
#define THREAD 0
#endif

typedef struct {
    ptrdiff_t first, end, top, bottom, height, columns, channels, width, threads; /* height in rows, columns in tiles */
} Block;

#define In const REAL *restrict
#define Out REAL *restrict
#define RELU(value) ((value) < 0 ? 0 : (value)) /* keeps NaN */
#define EACH_CHANNEL(count) _Pragma("omp simd") for (ptrdiff_t c = 0; c < (count); c++)
#define EACH_ROW(b)                                             \
    _Pragma("omp parallel for num_threads((b)->threads) collapse(2) if ((b)->threads > 1)") \
    for (ptrdiff_t s = (b)->first; s < (b)->end; s++)           \
        for (ptrdiff_t y = (b)->top; y < (b)->bottom; y++)

/* number of tile `x` of row `y` of sample `s` */
static ptrdiff_t number(const Block *b, ptrdiff_t s, ptrdiff_t y, ptrdiff_t x) {
    return ((s - b->first) * (b->bottom - b->top) + y - b->top) * b->columns + x;
}

#define REAL float
#define NAME(name) name##_float
#include "winograd_transforms.c"
#undef REAL
#undef NAME
#define REAL double
#define NAME(name) name##_double
#include "winograd_transforms.c"
#else

static inline void NAME(windows_line)(const REAL *const *v, Out o, ptrdiff_t step, ptrdiff_t n, int relu) {
    In p0 = v[0]; In p1 = v[1]; In p2 = v[2]; In p3 = v[3]; In p4 = v[4]; In p5 = v[5];
    EACH_CHANNEL(n) {
        REAL v0 = p0[c], v1 = p1[c], v2 = p2[c], v3 = p3[c], v4 = p4[c], v5 = p5[c];
        if (relu) v0 = RELU(v0), v1 = RELU(v1), v2 = RELU(v2), v3 = RELU(v3), v4 = RELU(v4), v5 = RELU(v5);
        REAL even = v4 - 4 * v2, odd = v3 - 4 * v1, less = v4 - v2, twice = 2 * (v3 - v1);
        o[c] = 4 * v0 - 5 * v2 + v4;
        o[c + step] = even + odd;
        o[c + 2 * step] = even - odd;
        o[c + 3 * step] = less + twice;
        o[c + 4 * step] = less - twice;
        o[c + 5 * step] = 4 * v1 - 5 * v3 + v5;
    }
}

void NAME(take_windows)(In maps, Out places, Out scratch, const Block *b, int relu) {
    const ptrdiff_t channels = b->channels, width = b->width, line = 4 * b->columns * channels;
    const ptrdiff_t framed = line + 2 * channels, all = number(b, b->end, b->top, 0) * width;
    Out nothing = scratch + b->threads * 6 * framed; /* a row of zeros */
    memset(nothing, 0, sizeof(REAL) * line);
    EACH_ROW(b) {
        Out half = scratch + THREAD * 6 * framed;
        const REAL *rows[6];
        for (ptrdiff_t k = 0; k < 6; k++) {
            ptrdiff_t row = 4 * y - 1 + k;
            rows[k] = row < 0 || row >= b->height ? nothing : maps + (s * b->height + row) * line;
            memset(half + k * framed, 0, sizeof(REAL) * channels);
            memset(half + (k + 1) * framed - channels, 0, sizeof(REAL) * channels);
        }
        if (relu)
            NAME(windows_line)(rows, half + channels, framed, line, 1);
        else
            NAME(windows_line)(rows, half + channels, framed, line, 0);
        for (ptrdiff_t x = 0; x < b->columns; x++)
            for (ptrdiff_t i = 0; i < 6; i++) {
                for (ptrdiff_t k = 0; k < 6; k++) rows[k] = half + i * framed + (4 * x + k) * channels;
                Out to = places + i * all + number(b, s, y, x) * width;
                NAME(windows_line)(rows, to, 6 * all, channels, 0);
                for (ptrdiff_t j = 0; j < 6 && channels < width; j++)
                    memset(to + 6 * j * all + channels, 0, sizeof(REAL) * (width - channels));
            }
    }
}

static inline void NAME(tiles_line)(In v0, In v1, In v2, In v3, Out o, ptrdiff_t step, ptrdiff_t n, int relu) {
    EACH_CHANNEL(n) {
        REAL t0 = v0[c], t1 = v1[c], t2 = v2[c], t3 = v3[c];
        if (relu) t0 = RELU(t0), t1 = RELU(t1), t2 = RELU(t2), t3 = RELU(t3);
        REAL even = t0 + t2, odd = t1 + t3, even4 = t0 + 4 * t2, odd4 = 2 * t1 + 8 * t3;
        o[c] = t0;
        o[c + step] = even + odd;
        o[c + 2 * step] = even - odd;
        o[c + 3 * step] = even4 + odd4;
        o[c + 4 * step] = even4 - odd4;
        o[c + 5 * step] = t3;
    }
}

void NAME(take_tiles)(In maps, Out places, Out scratch, const Block *b, int relu) {
    const ptrdiff_t channels = b->channels, width = b->width, line = 4 * b->columns * channels, part = 4 * channels;
    const ptrdiff_t all = number(b, b->end, b->top, 0) * width;
    EACH_ROW(b) {
        Out half = scratch + THREAD * 6 * part;
        for (ptrdiff_t x = 0; x < b->columns; x++) {
            In in = maps + (s * b->height + 4 * y) * line + x * part;
            if (relu)
                NAME(tiles_line)(in, in + line, in + 2 * line, in + 3 * line, half, part, part, 1);
            else
                NAME(tiles_line)(in, in + line, in + 2 * line, in + 3 * line, half, part, part, 0);
            for (ptrdiff_t i = 0; i < 6; i++) {
                In from = half + i * part;
                Out to = places + i * all + number(b, s, y, x) * width;
                NAME(tiles_line)(from, from + channels, from + 2 * channels, from + 3 * channels, to, 6 * all, channels, 0);
                for (ptrdiff_t j = 0; j < 6 && channels < width; j++)
                    memset(to + 6 * j * all + channels, 0, sizeof(REAL) * (width - channels));
            }
        }
    }
}

static inline void NAME(sums_line)(In v, ptrdiff_t from, Out o, ptrdiff_t step, ptrdiff_t n) {
    EACH_CHANNEL(n) {
        REAL v1 = v[c + from], v2 = v[c + 2 * from], v3 = v[c + 3 * from], v4 = v[c + 4 * from];
        REAL even = v1 + v2, odd = v1 - v2, even4 = v3 + v4, odd4 = v3 - v4;
        o[c] = v[c] + even + even4;
        o[c + step] = odd + 2 * odd4;
        o[c + 2 * step] = even + 4 * even4;
        o[c + 3 * step] = odd + 8 * odd4 + v[c + 5 * from];
    }
}

/* out = (out + bias + add) where `positive` is; NULL: without. The offset of `out` is that of `add` and `positive`. */
static inline void NAME(finish)(Out out, ptrdiff_t offset, In bias, In add, In positive, ptrdiff_t n) {
    if (bias) EACH_CHANNEL(n) out[offset + c] += bias[c];
    if (add) EACH_CHANNEL(n) out[offset + c] += add[offset + c];
    if (positive) EACH_CHANNEL(n) out[offset + c] = positive[offset + c] <= 0 ? 0 : out[offset + c];
}

void NAME(put_tiles)(In places, Out out, Out scratch, const Block *b, In bias, ptrdiff_t bias_step, In add, In positive) {
    const ptrdiff_t channels = b->channels, width = b->width, line = 4 * b->columns * channels;
    const ptrdiff_t all = number(b, b->end, b->top, 0) * width;
    EACH_ROW(b) {
        Out half = scratch + THREAD * 24 * channels; /* [4, 6, channels] */
        for (ptrdiff_t x = 0; x < b->columns; x++) {
            for (ptrdiff_t j = 0; j < 6; j++)
                NAME(sums_line)(places + 6 * j * all + number(b, s, y, x) * width, all, half + j * channels,
                                6 * channels, channels);
            for (ptrdiff_t r = 0; r < 4; r++) {
                ptrdiff_t offset = (s * b->height + 4 * y + r) * line + 4 * x * channels;
                NAME(sums_line)(half + 6 * r * channels, channels, out + offset, channels, channels);
                for (ptrdiff_t k = 0; k < 4 && bias; k++)
                    NAME(finish)(out, offset + k * channels, bias + s * bias_step, NULL, NULL, channels);
                NAME(finish)(out, offset, NULL, add, positive, 4 * channels);
            }
        }
    }
}

/* The 4 rows of a chain of windows, given its places and the last of the window before, the first of the one behind. */
static inline void NAME(chain_line)(In before, In v, ptrdiff_t from, In behind, Out o, ptrdiff_t step, ptrdiff_t n) {
    EACH_CHANNEL(n) {
        REAL v1 = v[c + from], v2 = v[c + 2 * from], v3 = v[c + 3 * from], v4 = v[c + 4 * from];
        REAL even = v1 + v2, odd = v1 - v2, even4 = v3 + v4, odd4 = v3 - v4;
        o[c] = 4 * (v[c + 5 * from] - odd) - 2 * odd4 + before[c];
        o[c + step] = -5 * v[c] - 4 * even - even4;
        o[c + 2 * step] = odd + 2 * odd4 - 5 * v[c + 5 * from];
        o[c + 3 * step] = v[c] + even + even4 + 4 * behind[c];
    }
}

/* `below` [samples, W, C]: in, what the block before adds to the row below it; out, the same of this one. */
void NAME(put_windows)(In places, Out out, Out scratch, const Block *b, Out below, In bias, ptrdiff_t bias_step, In add,
                       In positive) {
    const ptrdiff_t channels = b->channels, width = b->width, line = 4 * b->columns * channels, rows = b->bottom - b->top;
    const ptrdiff_t all = number(b, b->end, b->top, 0) * width;
    Out nothing = scratch + (b->end - b->first) * rows * 6 * line;
    memset(nothing, 0, sizeof(REAL) * line);
    EACH_ROW(b)
        for (ptrdiff_t x = 0; x < b->columns; x++)
            for (ptrdiff_t i = 0; i < 6; i++) {
                In from = places + i * all + number(b, s, y, x) * width;
                NAME(chain_line)(x ? from + 30 * all - width : nothing, from, 6 * all,
                                 x + 1 < b->columns ? from + width : nothing,
                                 scratch + (((s - b->first) * rows + y - b->top) * 6 + i) * line + 4 * x * channels,
                                 channels, channels);
            }
    EACH_ROW(b) {
        Out half = scratch + ((s - b->first) * rows + y - b->top) * 6 * line;
        In before = y > b->top ? half - line : y ? below + (s - b->first) * line : nothing;
        ptrdiff_t offset = (s * b->height + 4 * y) * line;
        NAME(chain_line)(before, half, line, y + 1 < b->bottom ? half + 6 * line : nothing, out + offset, line, line);
        for (ptrdiff_t k = 0; k < 16 * b->columns && bias; k++)
            NAME(finish)(out, offset + k * channels, bias + s * bias_step, NULL, NULL, channels);
        NAME(finish)(out, offset, NULL, add, positive, 4 * line);
    }
    for (ptrdiff_t s = b->first; s < b->end; s++) {
        Out half = scratch + (s - b->first) * rows * 6 * line;
        if (b->top) { /* into the last row of the block before */
            ptrdiff_t offset = (s * b->height + 4 * b->top - 1) * line;
            EACH_CHANNEL(line) out[offset + c] += 4 * half[c];
            NAME(finish)(out, offset, NULL, NULL, positive, line);
        }
        memcpy(below + (s - b->first) * line, half + (6 * rows - 1) * line, sizeof(REAL) * line);
    }
}

/* out [count, channels] = sums [count, width] with bias and sum, or 0 where `positive` is not */
void NAME(put_rows)(In sums, Out out, ptrdiff_t count, ptrdiff_t channels, ptrdiff_t width, ptrdiff_t threads, In bias,
                    In add, In positive) {
    _Pragma("omp parallel for num_threads(threads) if (threads > 1)")
    for (ptrdiff_t row = 0; row < count; row++) {
        memcpy(out + row * channels, sums + row * width, sizeof(REAL) * channels);
        NAME(finish)(out, row * channels, bias, add, positive, channels);
    }
}

static inline void NAME(filters_line)(In v0, In v1, In v2, Out o, ptrdiff_t step, ptrdiff_t n) {
    const REAL sixth = (REAL)1 / 6;
    EACH_CHANNEL(n) {
        REAL even = -sixth * (v0[c] + v2[c]), odd = -sixth * v1[c];
        REAL even4 = sixth * (v0[c] / 4 + v2[c]), odd4 = v1[c] / 12;
        o[c] = v0[c] / 4;
        o[c + step] = even + odd;
        o[c + 2 * step] = even - odd;
        o[c + 3 * step] = even4 + odd4;
        o[c + 4 * step] = even4 - odd4;
        o[c + 5 * step] = v2[c];
    }
}

/* places [36, rows, width] of 3x3 filters: that of a row and a column begins at row * row_step + column * column_step. */
void NAME(take_filters)(In weight, Out places, Out scratch, ptrdiff_t rows, ptrdiff_t columns, ptrdiff_t width,
                        ptrdiff_t row_step, ptrdiff_t column_step, int flipped, ptrdiff_t threads) {
    _Pragma("omp parallel for num_threads(threads) if (threads > 1)")
    for (ptrdiff_t r = 0; r < rows; r++) {
        Out values = scratch + THREAD * 27 * columns; /* [9, columns] */
        Out half = values + 9 * columns;              /* [6, 3, columns] */
        for (ptrdiff_t c = 0; c < columns; c++)
            for (ptrdiff_t k = 0; k < 9; k++)
                values[k * columns + c] = weight[r * row_step + c * column_step + (flipped ? 8 - k : k)];
        for (ptrdiff_t x = 0; x < 3; x++)
            NAME(filters_line)(values + x * columns, values + (3 + x) * columns, values + (6 + x) * columns,
                               half + x * columns, 3 * columns, columns);
        for (ptrdiff_t i = 0; i < 6; i++) {
            In from = half + 3 * i * columns;
            Out to = places + (i * rows + r) * width;
            NAME(filters_line)(from, from + columns, from + 2 * columns, to, 6 * rows * width, columns);
            for (ptrdiff_t j = 0; j < 6 && columns < width; j++)
                memset(to + 6 * j * rows * width + columns, 0, sizeof(REAL) * (width - columns));
        }
    }
}

static inline void NAME(slopes_line)(In v, ptrdiff_t from, Out o, ptrdiff_t step, ptrdiff_t n) {
    const REAL sixth = (REAL)1 / 6;
    EACH_CHANNEL(n) {
        REAL v1 = v[c + from], v2 = v[c + 2 * from], v3 = v[c + 3 * from], v4 = v[c + 4 * from];
        REAL even = sixth * (v1 + v2), even4 = sixth * (v3 + v4);
        o[c] = v[c] / 4 - even + even4 / 4;
        o[c + step] = sixth * (v2 - v1) + sixth * (v3 - v4) / 2;
        o[c + 2 * step] = even4 - even + v[c + 5 * from];
    }
}

/* The gradient of contiguous filters [rows, columns, 9], given that of the places [36, rows, width]. */
void NAME(put_filters)(In places, Out weight, Out scratch, ptrdiff_t rows, ptrdiff_t columns, ptrdiff_t width,
                       int flipped, ptrdiff_t threads) {
    _Pragma("omp parallel for num_threads(threads) if (threads > 1)")
    for (ptrdiff_t r = 0; r < rows; r++) {
        Out values = scratch + THREAD * 27 * columns; /* [9, columns] */
        Out half = values + 9 * columns;              /* [3, 6, columns] */
        for (ptrdiff_t i = 0; i < 6; i++)
            NAME(slopes_line)(places + (i * rows + r) * width, 6 * rows * width, half + i * columns, 6 * columns, columns);
        for (ptrdiff_t x = 0; x < 3; x++)
            NAME(slopes_line)(half + 6 * x * columns, columns, values + x * columns, 3 * columns, columns);
        for (ptrdiff_t c = 0; c < columns; c++)
            for (ptrdiff_t k = 0; k < 9; k++)
                weight[(r * columns + c) * 9 + (flipped ? 8 - k : k)] = values[k * columns + c];
    }
}
#endif
