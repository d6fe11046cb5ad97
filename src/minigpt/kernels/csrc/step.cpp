// A step of a whole decoder in one parallel region: the kernels' bodies with barriers between.
#include "step.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>

#include "run.h"

namespace mg {

namespace {

// Memory between the bodies of a step, from one allocation; kept for the next step.
class Workspace {
 public:
  template <class T>
  void reserve(T*& place, int64_t count) {
    places_.push_back({reinterpret_cast<void**>(&place), bytes_});
    bytes_ += (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
  }

  // Settle all places; false where there is no memory.
  bool allocate() {
    thread_local Memory memory;
    char* begin = memory.at_least(bytes_);
    for (const Place& each : places_) *each.pointer = begin + each.offset;
    return begin != nullptr;
  }

 private:
  struct Memory {
    char* begin = nullptr;
    int64_t bytes = 0;

    char* at_least(int64_t wanted) {
      if (wanted <= bytes) return begin;
      std::free(begin);
      begin = static_cast<char*>(std::aligned_alloc(64, wanted));
      bytes = begin ? wanted : 0;
      return begin;
    }
    ~Memory() { std::free(begin); }
  };
  struct Place {
    void** pointer;
    int64_t offset;
  };
  std::vector<Place> places_;
  int64_t bytes_ = 64;
};

// All threads of the region. OpenMP's own sleeps after spinning a while: where other processes want
// the cores, one that only spun and yielded made a step a quarter slower.
void barrier() {
#pragma omp barrier
}

int64_t size_of(DType dtype) { return dtype == kBFloat16 ? 2 : 4; }

class Step {
 public:
  Step(const StepPlan& plan, const StepBatch& batch, int threads)
      : plan_(plan), batch_(batch), table_(table()) {
    schedule_ = make_schedule(batch.chunks, batch.num_chunks, plan.heads, plan.layout.kv_heads,
                              plan.window, threads);
  }

  bool prepare() {
    const KvLayout& layout = plan_.layout;
    int64_t rows = batch_.rows, size = size_of(plan_.dtype), head_dim = layout.head_dim;
    fused_width_ = (plan_.heads + 2 * layout.kv_heads) * head_dim;
    mixed_width_ = plan_.heads * head_dim;
    Workspace workspace;
    workspace.reserve(positions_, rows);
    workspace.reserve(slots_, rows);
    workspace.reserve(cos_, rows * head_dim / 2);
    workspace.reserve(sin_, rows * head_dim / 2);
    workspace.reserve(stream_, rows * plan_.width * size);
    workspace.reserve(normed_, rows * plan_.width * size);
    workspace.reserve(added_, rows * plan_.width * size);
    workspace.reserve(fused_, rows * fused_width_ * size);
    workspace.reserve(mixed_, rows * mixed_width_ * size);
    workspace.reserve(up_, rows * plan_.inner * (plan_.gated ? 2 : 1) * size);
    workspace.reserve(inner_, rows * plan_.inner * size);
    workspace.reserve(partials_, schedule_.partials * (head_dim + 2));
    workspace.reserve(scratch_, scratch_bytes());
    if (!workspace.allocate()) return false;
    for (const AttentionChunk* chunk = batch_.chunks; chunk != batch_.chunks + batch_.num_chunks;
         ++chunk)
      for (int i = 0; i < chunk->rows; ++i) {
        int position = chunk->position + i, size = layout.block_size;
        positions_[chunk->row + i] = position;
        slots_[chunk->row + i] =
            batch_.tables[chunk->table + position / size] * size + position % size;
      }
    return true;
  }

  // What one thread does.
  void run(int thread, int threads) {
    auto part = [&](auto body, const auto& args) {
      body(args, thread, threads);
      barrier();
    };
    turn(thread, threads);
    part(table_.embed,
         EmbedArgs{plan_.dtype, batch_.tokens, positions_, plan_.embedding, plan_.embedding_scales,
                   plan_.position_table, stream_, batch_.rows, plan_.width});
    for (int i = 0; i < plan_.num_layers; ++i) layer(plan_.layers[i], i == 0, part);
    finish(thread, threads);
    linear(*plan_.head, normed_, batch_.logits, batch_.num_logits, kFloat32, part);
  }

 private:
  // Attention and MLP, each behind a norm; the last result is added to the stream by the next
  // norm.
  template <class Part>
  void layer(const StepLayer& layer, bool first, Part part) {
    int64_t rows = batch_.rows;
    norm(layer.input_norm, first ? stream_ : added_, first ? nullptr : stream_, part);
    linear(*layer.qkv, normed_, fused_, rows, plan_.dtype, part);
    bool rotary = !plan_.position_table;
    part(table_.qkv, QkvArgs{plan_.dtype, plan_.layout, fused_, layer.cache, slots_,
                             layer.query_norm, layer.key_norm, rotary ? cos_ : nullptr,
                             rotary ? sin_ : nullptr, rows, plan_.heads, plan_.epsilon});
    AttentionArgs attention{plan_.dtype, plan_.layout, fused_, fused_width_, mixed_, layer.cache,
                            batch_.tables, plan_.heads, plan_.window, plan_.scale,
                            schedule_.units.data(), int64_t(schedule_.units.size()),
                            schedule_.cost, schedule_.merges.data(),
                            int64_t(schedule_.merges.size()), partials_};
    part(table_.attend, attention);
    if (attention.num_merges) part(table_.merge, attention);
    linear(*layer.output, mixed_, added_, rows, plan_.dtype, part);
    norm(layer.inner_norm, added_, stream_, part);
    linear(*layer.up, normed_, up_, rows, plan_.dtype, part);
    part(table_.activation,
         ActivationArgs{plan_.dtype, up_, inner_, rows, plan_.inner, plan_.gated});
    linear(*layer.down, inner_, added_, rows, plan_.dtype, part);
  }

  template <class Part>
  void norm(const StepNorm& norm, const void* input, void* residual, Part part) {
    int64_t rows = batch_.rows, width = plan_.width;
    if (plan_.layer_norm)
      part(table_.layer_norm, LayerNormArgs{plan_.dtype, input, residual, norm.weight, norm.bias,
                                            normed_, rows, width, plan_.epsilon});
    else
      part(table_.rms_norm, RmsNormArgs{plan_.dtype, input, residual, norm.weight, normed_, rows,
                                        width, plan_.epsilon});
  }

  template <class Part>
  void linear(const PackedWeight& weight, const void* input, void* output, int64_t rows,
              DType output_dtype, Part part) {
    LinearArgs args{&weight, plan_.dtype, output_dtype, input,
                    output, scratch_, rows, weight.kind == kWeightBFloat16 ? 1 : plan_.digits};
    part(table_.linear_prepare, args);
    part(table_.linear_multiply, args);
  }

  // The final norm of the rows that are wanted, together at the front of `normed_`.
  void finish(int thread, int threads) {
    char* hidden = static_cast<char*>(batch_.hidden);
    int64_t bytes = plan_.width * size_of(plan_.dtype), count = batch_.num_outputs;
    for (int64_t i = count * thread / threads; i < count * (thread + 1) / threads; ++i) {
      int64_t from = batch_.outputs[i] * bytes;
      const StepNorm& norm = plan_.final_norm;
      if (plan_.layer_norm)
        table_.layer_norm({plan_.dtype, added_ + from, stream_ + from, norm.weight, norm.bias,
                           normed_ + i * bytes, 1, plan_.width, plan_.epsilon}, 0, 1);
      else
        table_.rms_norm({plan_.dtype, added_ + from, stream_ + from, norm.weight,
                         normed_ + i * bytes, 1, plan_.width, plan_.epsilon}, 0, 1);
      if (hidden) std::memcpy(hidden + i * bytes, normed_ + i * bytes, bytes);
    }
    barrier();
  }

  // Cosines and sines of the rows' angles, as `model.layers.RotaryEmbedding` has them.
  void turn(int thread, int threads) {
    if (plan_.position_table) return;
    int64_t half = plan_.layout.head_dim / 2, rows = batch_.rows;
    for (int64_t row = rows * thread / threads; row < rows * (thread + 1) / threads; ++row)
      for (int64_t i = 0; i < half; ++i) {
        float angle = static_cast<float>(positions_[row]) * plan_.frequencies[i];
        cos_[row * half + i] = std::cos(angle);
        sin_[row * half + i] = std::sin(angle);
      }
  }

  int64_t scratch_bytes() const {
    int64_t most = linear_bytes(*plan_.head, batch_.num_logits);
    for (int i = 0; i < plan_.num_layers; ++i) {
      const StepLayer& layer = plan_.layers[i];
      for (const PackedWeight* weight : {layer.qkv, layer.output, layer.up, layer.down})
        most = std::max(most, linear_bytes(*weight, batch_.rows));
    }
    return most;
  }

  int64_t linear_bytes(const PackedWeight& weight, int64_t rows) const {
    LinearArgs args{&weight, plan_.dtype, plan_.dtype, nullptr, nullptr, nullptr, rows,
                    weight.kind == kWeightBFloat16 ? 1 : plan_.digits};
    return args.scratch_bytes();
  }

  const StepPlan& plan_;
  const StepBatch& batch_;
  const Table& table_;
  Schedule schedule_;
  int64_t fused_width_, mixed_width_;
  int32_t *positions_, *slots_;
  float *cos_, *sin_, *partials_;
  // (rows, ...) of the plan's dtype: the residual stream, its norm, what is added to it next;
  // fused query, key and value heads; mixed values; inside the MLP.
  char *stream_, *normed_, *added_, *fused_, *mixed_, *up_, *inner_;
  char* scratch_;
};

}  // namespace

}  // namespace mg

using namespace mg;

// Return 0, or 1 where there is no memory for the step's activations.
MG_API int32_t mg_step(const StepPlan* plan, const StepBatch* batch) {
  int threads = omp_get_max_threads();
  Step step(*plan, *batch, threads);
  if (!step.prepare()) return 1;
  if (threads == 1) {
    step.run(0, 1);
    return 0;
  }
#pragma omp parallel num_threads(threads)
  step.run(omp_get_thread_num(), omp_get_num_threads());
  return 0;
}
