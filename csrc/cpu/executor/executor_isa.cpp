// The layers of a network, one after the other, in the instructions of one ISA: compiled several times, each time with
// SGM_ISA naming the set (and the namespace). See program.h for what this file may include.
#include "direct.h"
#include "winograd.h"
#ifndef SGM_AVX512_BF16
#include "attention.h"
#include "backward.h"
#include "channel_norm.h"
#include "depthwise.h"
#include "embed.h"
#include "heads.h"
#include "linear_attention.h"
#include "pointwise.h"
#include "potential.h"
#include "reshape.h"
#include "store.h"
#endif

namespace sgm::SGM_ISA::executor {

template <class Element>
static void convolve(const Run& run, const Layer& layer, const Conv& conv) {
  if (conv.winograd) winograd<Element>(run, layer, conv);
  else direct<Element>(run, layer, conv);
}

static void convolve_bf16(const Program& program, const Workspace& workspace, const Member& member, const Batch& batch,
                          const Layer& layer, const Conv& conv) {
  convolve<Bf16>({program, workspace, member, batch, batch.images}, layer, conv);
}

#ifndef SGM_AVX512_BF16
static void forward(const Program& program, const Workspace& workspace, const Member& member, const Batch& batch) {
  const Run run{program, workspace, member, batch, batch.images};
  for (int i = 0; i < program.layer_count; i++) {
    const Layer& layer = program.layers[i];
    const Conv* conv = layer.conv < 0 ? nullptr : program.convs + layer.conv;
    switch (layer.op) {
      case Op::load: load_input(run, layer); break;
      case Op::conv:
        if (conv->depthwise) depthwise(run, layer, *conv);
        else if (conv->bf16) program.convolve_bf16(program, workspace, member, batch, layer, *conv);
        else convolve<Float>(run, layer, *conv);
        break;
      case Op::activate: activate_layer(run, layer); break;
      case Op::mean_pool: mean_pool(run, layer); break;
      case Op::mean_pool5: pool5<false>(run, layer); break;
      case Op::max_pool5: pool5<true>(run, layer); break;
      case Op::upsample: upsample(run, layer); break;
      case Op::nearest: nearest(run, layer); break;
      case Op::concat: concat(run, layer); break;
      case Op::store: store_score(run, layer, *conv); break;
      case Op::embed: embed(run, layer); break;
      case Op::attention: attention(run, layer); break;
      case Op::slope: slope_layer(run, layer); break;
      case Op::norm_backward: norm_backward(run, layer); break;
      case Op::attention_backward: attention_backward(run, layer); break;
      case Op::spread: spread(run, layer); break;
      case Op::block_sum: block_sum(run, layer); break;
      case Op::slice: slice(run, layer); break;
      case Op::store_gradient: store_gradient(run, layer); break;
      case Op::linear_attention: linear_attention(run, layer); break;
      case Op::channel_norm: channel_norm(run, layer); break;
      case Op::noise_features: noise_features(run, layer); break;
      case Op::waves: waves(run, layer); break;
      case Op::potential: potential(run, layer); break;
      case Op::store_potential: store_potential(run, layer); break;
      case Op::constant: constant(run, layer); break;
      case Op::reshape: reshape(run, layer); break;
      case Op::affine_backward: affine_backward(run, layer); break;
      case Op::film_backward: film_backward(run, layer); break;
    }
  }
}
#endif

}  // namespace sgm::SGM_ISA::executor

namespace sgm::SGM_ISA {

sgm::executor::Backend executor_backend() {
#ifdef SGM_AVX512_BF16
  const sgm::executor::Backend rest = avx512::executor_backend();
  return {rest.width, rest.max_vectors, rest.forward, executor::convolve_bf16};
#else
  return {executor::kWidth, executor::kMaxVectors, executor::forward, executor::convolve_bf16};
#endif
}

}  // namespace sgm::SGM_ISA
