// Every launcher, named and shaped as its Triton twin in kernels/triton, except that outputs are allocated by the
// caller. An Array that may be absent says "or none". Matrices have a unit last stride and a free row stride unless
// "contiguous" is said; vectors are contiguous. Floating dtypes may differ where "any" is said: float32, float16 or
// bfloat16.
#pragma once

#include <string>

#include "array.h"

namespace fastvit {

// s = x, or residual + row_scale * gamma * x; y = (s - mean) * rstd * weight + bias.
void layer_norm_forward(
    const Device& device,
    const Array& x,          // (M, D) any
    const Array& weight,     // (D,) any, or none
    const Array& bias,       // (D,) any, or none
    double eps,
    const Array& residual,   // (M, D) any, or none
    const Array& gamma,      // (D,) any, or none
    const Array& row_scale,  // (B,) float32, or none: row m takes entry m / (M / B)
    const Array& y,          // (M, D) any, contiguous; or none: only the statistics are wanted
    const Array& stream,     // (M, D) in the residual's dtype, contiguous; none without a residual
    const Array& mean,       // (M,) float32
    const Array& rstd);      // (M,) float32

// The gradients: total = rstd * (g - mean(g) - xhat * mean(g * xhat)) + dstream with g = dy * weight.
void layer_norm_backward(
    const Device& device,
    const Array& dy,          // (M, D) any
    const Array& dstream,     // (M, D) any, or none
    const Array& normalised,  // (M, D) any: what the norm read
    const Array& weight,      // (D,) any, or none
    const Array& mean,        // (M,) float32
    const Array& rstd,        // (M,) float32
    const Array& branch,      // (M, D) any, or none: the x that was merged into the stream
    const Array& gamma,       // (D,) any, or none
    const Array& row_scale,   // (B,) float32, or none
    const Array& dx,          // (M, D) contiguous: total, or with a branch row_scale * gamma * total
    const Array& dresidual,   // (M, D) in normalised's dtype, contiguous: total; none without a branch
    const Array& partials);   // (programs, 2 or 3, D) float32: dweight, dbias (, dgamma with a gamma); or none

// How many rows of partials the kernel above writes.
int64_t layer_norm_programs(const Device& device, int64_t rows, int64_t width);

// sums (...) = sum of partials (S, ...) over S in a fixed order; contiguous, partials any, sums float32.
void sum_partials(const Device& device, const Array& partials, const Array& sums);

// out (M, N) = row_scale * x (M, N), any dtypes, out contiguous; row_scale (B,) float32 or none.
void scale_rows(const Device& device, const Array& x, const Array& row_scale, const Array& out);

// out (M, N) = act(x[:, :N]) * x[:, N:], x (M, 2N); out contiguous in x's dtype.
void gated_forward(const Device& device, const Array& x, const std::string& activation, const Array& out);

// dpreact, in preact's shape and dtype, and hidden = act(preact) (M, N), both contiguous. dout (M, N), preact (M, N),
// or (M, 2N): gates, then values. activation: a name in activations.cuh, here and below.
void activation_gradient(
    const Device& device,
    const Array& dout,
    const Array& preact,
    const std::string& activation,
    const Array& dpreact,
    const Array& hidden);

// out = residual + row_scale * gamma * act(x weight^T + bias), products summed in float32.
void linear_forward(
    const Device& device,
    const Array& x,       // (M, K) float16 or bfloat16
    const Array& weight,  // (N, K) x's dtype, contiguous
    const Array& bias,    // (N,) any, or none
    const std::string& activation,  // or "": none
    const Array& residual,   // (M, N) any, or none
    const Array& gamma,      // (N,) any, or none
    const Array& row_scale,  // (B,) float32, or none
    const Array& out,        // (M, N) in the residual's dtype, else x's; contiguous
    const Array& preact);    // (M, N) x's dtype, contiguous: x weight^T + bias; or none

// A norm folded into the linear layer after it: with norm's weight g and bias b,
// LN(x) weight^T + bias = rstd * (x folded^T - mean * sums) + offsets, where folded = g * weight, rounded, sums are
// those of its rows as rounded, and offsets = weight b + bias.
void fold_norm(
    const Device& device,
    const Array& weight,       // (N, K) float16 or bfloat16, contiguous
    const Array& bias,         // (N,) any, or none
    const Array& norm_weight,  // (K,) any, or none
    const Array& norm_bias,    // (K,) any, or none
    const Array& folded,       // (N, K) weight's dtype, contiguous
    const Array& sums,         // (N,) float32
    const Array& offsets);     // (N,) float32

// out = act(rstd * (x weight^T - mean * sums) + offsets), products summed in float32.
void linear_folded_forward(
    const Device& device,
    const Array& x,        // (M, K) float16 or bfloat16
    const Array& weight,   // (N, K) x's dtype, contiguous
    const Array& sums,     // (N,) float32
    const Array& offsets,  // (N,) float32
    const Array& mean,     // (M,) float32
    const Array& rstd,     // (M,) float32
    const std::string& activation,  // as above
    const Array& out);     // (M, N) x's dtype, contiguous

// dx = (gamma * dout) weight; with an activation, dx * act'(preact), and hidden = act(preact).
void linear_input_gradient(
    const Device& device,
    const Array& dout,    // (M, N) weight's dtype
    const Array& weight,  // (N, K) float16 or bfloat16, contiguous
    const Array& gamma,   // (N,) any, or none
    const Array& preact,  // (M, K) weight's dtype, contiguous; or none
    const std::string& activation,  // "" without a preact
    const Array& dx,       // (M, K) any, contiguous
    const Array& hidden);  // (M, K) weight's dtype, contiguous; none without a preact

// partials[s] = dout[rows of s]^T x[rows of s] for splits of the rows; bias_partials[s] = their sums.
// The caller adds the splits with sum_partials.
void linear_weight_gradient(
    const Device& device,
    const Array& dout,            // (M, N) x's dtype
    const Array& x,               // (M, K) float16 or bfloat16
    const Array& partials,        // (S, N, K) float32, contiguous
    const Array& bias_partials);  // (S, N) float32, contiguous; or none

// The S that suits these sizes.
int64_t linear_weight_gradient_splits(const Device& device, int64_t m, int64_t n, int64_t k);

// dweight (N, K) = gamma * g (by rows) and dgamma (N,) = rowsum(weight * g) + bias * sums, with g (N, K) float32 and
// sums (N,) float32, the gradients without gamma. With an absent gamma, dweight = g, rounded, and no dgamma.
void finish_weight_gradient(
    const Device& device,
    const Array& g,        // (N, K) float32, contiguous
    const Array& sums,     // (N,) float32, or none: scaled by gamma in place
    const Array& weight,   // (N, K) contiguous, or none
    const Array& bias,     // (N,) any, or none
    const Array& gamma,    // (N,) any, or none
    const Array& dweight,  // (N, K) any, contiguous
    const Array& dgamma);  // (N,) float32, or none

// The options of fastvit/attention_options.py: its tensors in their order, then its numbers. What is none, or 0, changes
// nothing. Scores are x = scale * q k^T + bias, or + rel_pos_table[...]; where key_mask is 0, -inf. A row without any key
// gives zeros, a lse of -inf and no gradient. The struct, the schemas and their unboxing (library.cpp) derive from this.
#define FASTVIT_ATTENTION_OPTIONS(ARRAY, INTEGER, REAL)                                                             \
  ARRAY(bias)          /* (B, H, Tq, Tk) any, any strides (0 where it is broadcast) */                             \
  ARRAY(rel_pos_table) /* ((2h - 1) (2w - 1) [+ 3], H) any, any strides: BEiT's, of a window of h x w patches */   \
  ARRAY(rel_pos_keys)  /* (H, 2T - 1, d) in q's dtype, a head's contiguous: + scale q_i . rel_pos_keys[i - j + T - 1] */ \
  ARRAY(key_mask)      /* (B, Tk) uint8, any strides: 0 for absent keys */                                         \
  ARRAY(cu_q)          /* (n + 1,) int32: the starts of n sequences that lie packed in the one row of q; B is 1 then, */ \
  ARRAY(cu_k)          /*   and vectors are (1, H, Tq). Kernels clamp them to the tensors. */                      \
  ARRAY(seed)          /* (1,) int64: of dropout */                                                                \
  INTEGER(window_height)                                                                                           \
  INTEGER(window_width)                                                                                            \
  INTEGER(max_q)       /* the longest sequence of q, and of k */                                                   \
  INTEGER(max_k)                                                                                                   \
  REAL(dropout_p)      /* weight (i, j) stays if Philox4x32-10 of (j, i, image * H + head, 0) reaches p * 2^32 */

struct AttentionOptions {
#define FASTVIT_ARRAY(name) Array name;
#define FASTVIT_INTEGER(name) int64_t name = 0;
#define FASTVIT_REAL(name) double name = 0;
  FASTVIT_ATTENTION_OPTIONS(FASTVIT_ARRAY, FASTVIT_INTEGER, FASTVIT_REAL)
#undef FASTVIT_ARRAY
#undef FASTVIT_INTEGER
#undef FASTVIT_REAL

  bool any() const { return bias || rel_pos_table || rel_pos_keys || key_mask || cu_q || cu_k || dropout_p != 0; }
};

// out = softmax(x) v for every head, weights dropped out after the softmax; lse the natural logarithm of its denominator.
// Tk > 0.
void attention_forward(
    const Device& device,
    const AttentionOptions& options,
    const Array& q,     // (B, Tq, H, d) float16 or bfloat16, last stride 1, others multiples of 8
    const Array& k,     // (B, Tk, H, d)
    const Array& v,     // (B, Tk, H, d)
    double scale,
    const Array& out,   // (B, Tq, H, d)
    const Array& lse);  // (B, H, Tq) float32, contiguous

// dq, and delta = rowsum(out * dout) - dlse.
void attention_query_gradient(
    const Device& device,
    const AttentionOptions& options,
    const Array& dout,  // (B, Tq, H, d)
    const Array& dlse,  // (B, H, Tq) float32, contiguous, or none
    const Array& q,
    const Array& k,
    const Array& v,
    const Array& out,
    const Array& lse,
    double scale,
    const Array& dq,      // (B, Tq, H, d)
    const Array& delta);  // (B, H, Tq) float32, contiguous

// dk and dv.
void attention_key_value_gradient(
    const Device& device,
    const AttentionOptions& options,
    const Array& dout,
    const Array& q,
    const Array& k,
    const Array& v,
    const Array& lse,
    const Array& delta,
    double scale,
    const Array& dk,   // (B, Tk, H, d)
    const Array& dv);  // (B, Tk, H, d)

// The gradient of the bias, summed over what it is broadcast over; not with packed sequences.
void attention_bias_gradient(
    const Device& device,
    const AttentionOptions& options,
    const Array& dout,
    const Array& q,
    const Array& k,
    const Array& v,
    const Array& lse,
    const Array& delta,
    double scale,
    const Array& dbias);  // (B or 1, H or 1, Tq or 1, Tk or 1) float32, contiguous

// The gradient of the table.
void attention_table_gradient(
    const Device& device,
    const AttentionOptions& options,
    const Array& dout,
    const Array& q,
    const Array& k,
    const Array& v,
    const Array& lse,
    const Array& delta,
    double scale,
    const Array& dtable);  // (R, H) float32, contiguous

// The gradient of the relative position keys, summed over the heads where there is one for all.
void attention_rel_pos_keys_gradient(
    const Device& device,
    const AttentionOptions& options,
    const Array& dout,
    const Array& q,
    const Array& k,
    const Array& v,
    const Array& lse,
    const Array& delta,
    double scale,
    const Array& drel_pos_keys);  // (H or 1, 2T - 1, d) float32, contiguous

// out[b, h, r] = exp(scale q[b, rows[r], h] k^T + bias - lse): rows of attention's weights. A row with lse = -inf is 0.
void attention_rows(
    const Device& device,
    const Array& q,     // (B, Tq, H, d) float16 or bfloat16, last stride 1, others multiples of 8
    const Array& k,     // (B, Tk, H, d)
    const Array& lse,   // (B, H, Tq) float32, contiguous
    const Array& rows,  // (R,) int64, contiguous, from the end where negative; NaN comes of one that is no row
    const Array& bias,  // (B, H, R, Tk) float32, any strides, or none
    double scale,
    const Array& out);  // (B, H, R, Tk) float32, contiguous

// partials[s] (blocks, B, H) float32, contiguous: this block's part of the mean over the patches i of sum_j p_ij |i - j|.
// The last height * width tokens are the patches, by lines; a patch is patch_height x patch_width.
void attention_distance(
    const Device& device, const Array& q, const Array& k, const Array& lse, double scale, int64_t height, int64_t width,
    double patch_height, double patch_width, const Array& partials);

// How many blocks that is.
int64_t attention_distance_blocks(const Device& device, int64_t patches);

// x cos + half(x) sin for x in (q, k), half(x) = (-x[d/2:], x[:d/2]); with inverse the transpose of that.
void apply_rotary(
    const Device& device,
    const Array& q,        // (B, T, H, d) float16 or bfloat16, last stride 1, others multiples of 8
    const Array& k,        // (B, T, H, d)
    const Array& cos,      // (T', d) or (B, T', d) any, contiguous: of the last T' tokens, the others are copied
    const Array& sin,      // like cos
    int64_t inverse,       // 0 or 1
    const Array& q_out,    // (B, T, H, d), may be q
    const Array& k_out);   // (B, T, H, d), may be k

// Patches of images to tokens, prefix tokens first.
void patch_embed_forward(
    const Device& device,
    const Array& images,   // (B, C, H, W) uint8 or any, any strides
    const Array& weight,   // (D, C, p, q) float16 or bfloat16, contiguous
    const Array& bias,     // (D,) any, or none
    const Array& pos_embed,      // (P + N or N, D) any, contiguous; or none
    const Array& prefix_tokens,  // (P, D) any, contiguous; or none
    const Array& mean,     // (C,) float32, or none
    const Array& std,      // (C,) float32, or none
    const Array& out);     // (B, P + N, D) any, contiguous

// partials[s] (S, D, C * p * q) float32: the weight's gradient from the rows of each split.
void patch_embed_weight_gradient(
    const Device& device,
    const Array& dout,    // (B, P + N, D) float16 or bfloat16, contiguous
    const Array& images,  // (B, C, H, W) uint8 or any, any strides
    const Array& mean,
    const Array& std,
    int64_t patch_height,
    int64_t patch_width,
    int64_t prefix,       // P
    const Array& partials);

// The S that suits these sizes: rows = B * N, features = C * p * q.
int64_t patch_embed_weight_gradient_splits(const Device& device, int64_t rows, int64_t width, int64_t features);

// dimages (B, C, H, W) any, contiguous.
void patch_embed_image_gradient(
    const Device& device,
    const Array& dout,    // (B, P + N, D) weight's dtype, contiguous
    const Array& weight,  // (D, C, p, q) contiguous
    const Array& std,     // (C,) float32, or none
    int64_t prefix,
    const Array& dimages);

// N patches of n packed images of any sizes to tokens, each image's after prefix tokens of its own. The tables are those
// of fastvit.packing.Layout; kernels take them as within the pixels, whatever they say.
void patch_embed_packed_forward(
    const Device& device,
    const Array& pixels,      // (S,) uint8 or any: images (C, H, W) of whole patches, one after the other
    const Array& weight,      // (D, C, p, q) float16 or bfloat16, contiguous
    const Array& bias,        // (D,) any, or none
    const Array& starts,      // (n,) int64: where an image begins, a multiple of q
    const Array& sizes,       // (n, 2) int32, contiguous: its height and width
    const Array& cu_patches,  // (n + 1,) int32: its first patch, and at the end N
    const Array& image,       // (N,) int32: whose a patch is
    const Array& row,         // (N,) int32: its place in the grid of that image's patches
    const Array& column,      // (N,) int32
    const Array& pos_embed,      // (N, D) any, contiguous; or none
    const Array& prefix_tokens,  // (P, D) any, contiguous; or none
    const Array& mean,        // (C,) float32, or none
    const Array& std,         // (C,) float32, or none
    const Array& out);        // (N + n * P, D) any, contiguous

// partials[s] (S, D, C * p * q) float32: the weight's gradient from the patches of each split.
void patch_embed_packed_weight_gradient(
    const Device& device,
    const Array& dout,        // (N, D) float16 or bfloat16, contiguous: of the patches alone
    const Array& pixels,
    int64_t patch_height,
    int64_t patch_width,
    const Array& starts,
    const Array& sizes,
    const Array& cu_patches,
    const Array& image,
    const Array& row,
    const Array& column,
    const Array& mean,
    const Array& std,
    const Array& partials);

}  // namespace fastvit
