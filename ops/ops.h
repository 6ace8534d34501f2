// SPDX-License-Identifier: Apache-2.0
// All operators of libflashlm_ops, and the optimizers' passes.
#pragma once

#include "ops/adamw.h"
#include "ops/adaptive_cross_entropy.h"
#include "ops/bit_linear.h"
#include "ops/causal_conv1d.h"
#include "ops/gated_conv.h"
#include "ops/glu.h"
#include "ops/hierarchical_cross_entropy.h"
#include "ops/linear_cross_entropy.h"
#include "ops/mlgru.h"
#include "ops/pack_ternary.h"
#include "ops/packed_linear.h"
#include "ops/rms_norm.h"
#include "ops/ternary_glu.h"
