// Simdgroup matrix operations that not every lane of the simdgroup reaches. They are executed by lane 0 alone and nobody
// waits, so the lanes' paths are compared when they next meet: at a barrier, at an exchange of all, or at their end.

#include <string.h>

#include "scheduler.h"

namespace rt {

void matrix_op_reached() { scheduler->matrix_op(reinterpret_cast<uint64_t>(__builtin_return_address(0))); }

bool MatrixOps::later(uint64_t site, uint32_t op) const {
  uint32_t known = count < kMost ? count : kMost;
  while (op < known && sites[op] != site) op++;
  return op < known;
}

void Scheduler::matrix_op(uint64_t site) {
  unsigned lane = line.current->lane;
  MatrixOps& ops = matrix_ops_[line.current->simdgroup];
  uint32_t op = ops.reached[lane]++;
  if (op == ops.count) {
    ops.count++;
    if (op < MatrixOps::kMost) ops.sites[op] = site, ops.first[op] = uint8_t(lane);
  } else if (op < MatrixOps::kMost && ops.sites[op] != site) {
    // Of two paths the longer one has an operation that the other skips: this one, unless the first lane came to it later.
    unsigned other = ops.first[op];
    if (!ops.later(site, op)) ops.sites[op] = site, ops.first[op] = uint8_t(lane), lane = other;
    report_matrix_op(line.current->simdgroup, op, lane);
  }
}

void Scheduler::report_matrix_op(unsigned simdgroup, uint32_t op, unsigned lane) {
  MatrixOps& ops = matrix_ops_[simdgroup];
  if (ops.reported) return;
  ops.reported = true;
  op = op < MatrixOps::kMost ? op : MatrixOps::kMost - 1;
  Fault what = fault(kind_simdgroup_divergence);
  what.op = op_matrix;
  what.threadgroup = int32_t(info_.linear_threadgroup);
  what.thread = int32_t(simdgroup * kSimdWidth + ops.first[op]);
  what.other_thread = int32_t(simdgroup * kSimdWidth + lane);
  what.pcs[0] = ops.sites[op];
  record(what);
}

void Scheduler::compare_matrix_ops(unsigned simdgroup) {
  MatrixOps& ops = matrix_ops_[simdgroup];
  if (!ops.count) return;
  uint32_t lanes = info_.thread_count - simdgroup * kSimdWidth;
  for (unsigned lane = 0; lane < kSimdWidth && lane < lanes; lane++) {
    if (ops.reached[lane] == ops.count) continue;
    report_matrix_op(simdgroup, ops.reached[lane], lane);
    break;
  }
  ops.count = 0;
  ops.reported = false;
  memset(ops.reached, 0, sizeof ops.reached);
}

}  // namespace rt
