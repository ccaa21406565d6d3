// Which family of kernels serves an architecture: the one place where that is decided. The families for Hopper are in
// the build where FASTVIT_SM90 is defined; those for compute capability 8.0 run on everything later too.

#include "ops.h"

namespace fastvit {

namespace sm80 {
void attention_forward(
    const Device&, const AttentionOptions&, const Array& q, const Array& k, const Array& v, double scale,
    const Array& out, const Array& lse);
void attention_query_gradient(
    const Device&, const AttentionOptions&, const Array& dout, const Array& dlse, const Array& q, const Array& k, const Array& v,
    const Array& out, const Array& lse, double scale, const Array& dq, const Array& delta);
void attention_key_value_gradient(
    const Device&, const AttentionOptions&, const Array& dout, const Array& q, const Array& k, const Array& v,
    const Array& lse, const Array& delta, double scale, const Array& dk, const Array& dv);
void attention_bias_gradient(
    const Device&, const AttentionOptions&, const Array& dout, const Array& q, const Array& k, const Array& v,
    const Array& lse, const Array& delta, double scale, const Array& dbias);
void attention_table_gradient(
    const Device&, const AttentionOptions&, const Array& dout, const Array& q, const Array& k, const Array& v,
    const Array& lse, const Array& delta, double scale, const Array& dtable);
void attention_rel_pos_keys_gradient(
    const Device&, const AttentionOptions&, const Array& dout, const Array& q, const Array& k, const Array& v,
    const Array& lse, const Array& delta, double scale, const Array& drel_pos_keys);
void linear_forward(
    const Device&, const Array& x, const Array& weight, const Array& bias, const std::string& activation,
    const Array& residual, const Array& gamma, const Array& row_scale, const Array& out, const Array& preact);
void linear_folded_forward(
    const Device&, const Array& x, const Array& weight, const Array& sums, const Array& offsets, const Array& mean,
    const Array& rstd, const std::string& activation, const Array& out);
void linear_input_gradient(
    const Device&, const Array& dout, const Array& weight, const Array& gamma, const Array& preact,
    const std::string& activation, const Array& dx, const Array& hidden);
void linear_weight_gradient(
    const Device&, const Array& dout, const Array& x, const Array& partials, const Array& bias_partials);
int64_t linear_weight_gradient_splits(const Device&, int64_t m, int64_t n, int64_t k);
}  // namespace sm80

namespace sm90 {
bool attention_forward_takes(const Device&, const Array& q, const Array& k, const Array& v);
void attention_forward(
    const Device&, const Array& q, const Array& k, const Array& v, double scale, const Array& out, const Array& lse);
bool linear_takes(int64_t m, int64_t n, int64_t k);
void linear_forward(
    const Device&, const Array& x, const Array& weight, const Array& bias, const std::string& activation,
    const Array& residual, const Array& gamma, const Array& row_scale, const Array& out, const Array& preact);
void linear_folded_forward(
    const Device&, const Array& x, const Array& weight, const Array& sums, const Array& offsets, const Array& mean,
    const Array& rstd, const std::string& activation, const Array& out);
void linear_input_gradient(
    const Device&, const Array& dout, const Array& weight, const Array& gamma, const Array& preact,
    const std::string& activation, const Array& dx, const Array& hidden);
void linear_weight_gradient(
    const Device&, const Array& dout, const Array& x, const Array& partials, const Array& bias_partials);
int64_t linear_weight_gradient_splits(const Device&, int64_t m, int64_t n, int64_t k);
}  // namespace sm90

namespace {

#ifdef FASTVIT_SM90
bool hopper(const Device& device) { return device.architecture == 90; }
#else
constexpr bool hopper(const Device&) { return false; }
#endif

}  // namespace

// Options are for the family for 8.0 alone.
void attention_forward(
    const Device& device, const AttentionOptions& options, const Array& q, const Array& k, const Array& v,
    double scale, const Array& out, const Array& lse) {
#ifdef FASTVIT_SM90
  if (hopper(device) && !options.any() && sm90::attention_forward_takes(device, q, k, v)) {
    return sm90::attention_forward(device, q, k, v, scale, out, lse);
  }
#endif
  sm80::attention_forward(device, options, q, k, v, scale, out, lse);
}

void attention_query_gradient(
    const Device& device, const AttentionOptions& options, const Array& dout, const Array& dlse, const Array& q,
    const Array& k, const Array& v, const Array& out, const Array& lse, double scale, const Array& dq,
    const Array& delta) {
  sm80::attention_query_gradient(device, options, dout, dlse, q, k, v, out, lse, scale, dq, delta);
}

void attention_key_value_gradient(
    const Device& device, const AttentionOptions& options, const Array& dout, const Array& q, const Array& k,
    const Array& v, const Array& lse, const Array& delta, double scale, const Array& dk, const Array& dv) {
  sm80::attention_key_value_gradient(device, options, dout, q, k, v, lse, delta, scale, dk, dv);
}

void attention_bias_gradient(
    const Device& device, const AttentionOptions& options, const Array& dout, const Array& q, const Array& k,
    const Array& v, const Array& lse, const Array& delta, double scale, const Array& dbias) {
  sm80::attention_bias_gradient(device, options, dout, q, k, v, lse, delta, scale, dbias);
}

void attention_table_gradient(
    const Device& device, const AttentionOptions& options, const Array& dout, const Array& q, const Array& k,
    const Array& v, const Array& lse, const Array& delta, double scale, const Array& dtable) {
  sm80::attention_table_gradient(device, options, dout, q, k, v, lse, delta, scale, dtable);
}

void attention_rel_pos_keys_gradient(
    const Device& device, const AttentionOptions& options, const Array& dout, const Array& q, const Array& k,
    const Array& v, const Array& lse, const Array& delta, double scale, const Array& drel_pos_keys) {
  sm80::attention_rel_pos_keys_gradient(device, options, dout, q, k, v, lse, delta, scale, drel_pos_keys);
}

void linear_forward(
    const Device& device, const Array& x, const Array& weight, const Array& bias, const std::string& activation,
    const Array& residual, const Array& gamma, const Array& row_scale, const Array& out, const Array& preact) {
#ifdef FASTVIT_SM90
  if (hopper(device) && sm90::linear_takes(x.size[0], weight.size[0], weight.size[1])) {
    return sm90::linear_forward(device, x, weight, bias, activation, residual, gamma, row_scale, out, preact);
  }
#endif
  sm80::linear_forward(device, x, weight, bias, activation, residual, gamma, row_scale, out, preact);
}

void linear_folded_forward(
    const Device& device, const Array& x, const Array& weight, const Array& sums, const Array& offsets,
    const Array& mean, const Array& rstd, const std::string& activation, const Array& out) {
#ifdef FASTVIT_SM90
  if (hopper(device) && sm90::linear_takes(x.size[0], weight.size[0], weight.size[1])) {
    return sm90::linear_folded_forward(device, x, weight, sums, offsets, mean, rstd, activation, out);
  }
#endif
  sm80::linear_folded_forward(device, x, weight, sums, offsets, mean, rstd, activation, out);
}

void linear_input_gradient(
    const Device& device, const Array& dout, const Array& weight, const Array& gamma, const Array& preact,
    const std::string& activation, const Array& dx, const Array& hidden) {
#ifdef FASTVIT_SM90
  if (hopper(device) && !gamma && sm90::linear_takes(dout.size[0], weight.size[1], weight.size[0])) {
    return sm90::linear_input_gradient(device, dout, weight, gamma, preact, activation, dx, hidden);
  }
#endif
  sm80::linear_input_gradient(device, dout, weight, gamma, preact, activation, dx, hidden);
}

void linear_weight_gradient(
    const Device& device, const Array& dout, const Array& x, const Array& partials, const Array& bias_partials) {
#ifdef FASTVIT_SM90
  if (hopper(device) && sm90::linear_takes(x.size[0], dout.size[1], x.size[1])) {
    return sm90::linear_weight_gradient(device, dout, x, partials, bias_partials);
  }
#endif
  sm80::linear_weight_gradient(device, dout, x, partials, bias_partials);
}

int64_t linear_weight_gradient_splits(const Device& device, int64_t m, int64_t n, int64_t k) {
#ifdef FASTVIT_SM90
  if (hopper(device) && sm90::linear_takes(m, n, k)) return sm90::linear_weight_gradient_splits(device, m, n, k);
#endif
  return sm80::linear_weight_gradient_splits(device, m, n, k);
}

}  // namespace fastvit
