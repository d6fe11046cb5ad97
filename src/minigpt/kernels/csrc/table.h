// The kernels of one level: what each takes, and a table of pointers to them.
//
// A kernel is a body `part(args, thread, threads)`: thread `thread` of `threads` does its share,
// with no OpenMP inside, so that one parallel region can run many of them with barriers between.
// To add a kernel: its args in an args_*.h, its pointer in Table, its body in a .inc file that level.cpp
// includes, its exported function in api_*.cpp.
#pragma once

#include "args_attention.h"
#include "args_linear.h"
#include "args_roofline.h"
#include "args_small.h"

namespace mg {

template <class Args>
using Part = void (*)(const Args& args, int thread, int threads);

struct Table {
  Part<RmsNormArgs> rms_norm;
  Part<QkvArgs> qkv;
  Part<AttentionArgs> attend, merge;
  Part<LayerNormArgs> layer_norm;
  Part<ActivationArgs> activation;
  Part<EmbedArgs> embed;
  Part<LargestArgs> largest;
  Part<TopArgs> top;
  Part<LinearArgs> linear_prepare;
  Part<LinearArgs> linear_multiply;  // after a barrier: any thread reads what all prepared
  Part<PackArgs> pack_units;
  Part<ReadArgs> read_memory;
  Part<PeakArgs> peak;
};

// Null where the library was built without the level.
struct Level {
  const char* name;
  const Table* table;
  bool (*runs)();  // whether this machine can run it
};

const Table& table();  // of the level in use

}  // namespace mg
