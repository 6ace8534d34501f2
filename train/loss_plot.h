// SPDX-License-Identifier: Apache-2.0
// The loss curve of a run as one self-contained SVG picture: no scripts, no fonts, no files beside it.
#pragma once

#include <string>
#include <vector>

namespace flashlm {

struct PlotPoint {
  double x = 0;
  double y = 0;  // nats per token
};

struct LossPlot {
  std::string title;
  std::string x_label = "step";
  std::vector<PlotPoint> train;       // drawn faint as it is, and smoothed
  std::vector<PlotPoint> validation;  // drawn as joined points
  /// Bits per byte = this times nats per token, (tokens / bytes) / ln 2 of the data: a second axis on the
  /// right. 0: no such axis.
  double bits_per_byte_per_nat = 0;
};

/// The picture, 960 x 540. Points must be ordered by x; those with a value that is not finite are left out.
/// Any number of points: what falls into the same pixel column is merged. The y axis fits what comes after
/// the first fiftieth of the run, so that the fall from the initial loss does not flatten all that follows;
/// curves enter from the top edge then.
std::string loss_plot_svg(const LossPlot& plot);

}  // namespace flashlm
