"""Simplification of exported ONNX graphs: constants are folded, and no-ops and duplicates are removed."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx_ir as ir
    from onnxscript.rewriter import RewriteRule

_ROUNDS = 2

# The rules that onnxscript applies by default, with two exceptions. Exports have no integer convolutions, so the rules
# for these are left out. ``slice_split_rule`` has two outputs, for which onnxscript searches the whole graph at each
# node: it took a third of the time of exporting SDXL, and never applies to a UNet.
_COMMUTING = ("mul_by_1", "add_0")
_RULES = (
    *("sub_0", "div_by_1", "dropout_zero", "dropout_inference"),
    *("two_reshapes_matmul_reshape", "one_reshape_matmul_reshape"),
    *("cast_constant_of_shape", "cast_constant_of_shape_without_value"),
    *("collapse_slice", "collapse_slice2", "materialize_reshape_shape"),
    *("min_min", "max_max", "min_max", "max_min"),
    *("successive_clip_relu", "successive_relu_clip", "successive_relu", "successive_clip"),
    *("cast_cast", "no_op_cast", "no_op_expand"),
    *("flatten_to_reshape", "reshape_reshape"),  # in this order
    *("no_op_transpose", "transpose_transpose", "unsqueeze_unsqueeze", "squeeze_reshape_1d"),
    *("no_op_dynamic_scatter_nd", "no_op_static_scatter_nd"),
    *("normalize_pad_format_conv", "fuse_pad_into_conv"),
    *("fuse_batchnorm_into_conv", "fuse_batchnorm_into_conv_transpose", "fuse_batchnorm_into_gemm"),
    *("remove_optional_bias_from_conv", "remove_optional_bias_from_conv_transpose", "remove_optional_bias_from_gemm"),
)


def simplify(model: ir.Model) -> None:
    """Do what ``onnxscript.optimizer.optimize_ir`` does, in place, in time linear in the size of the graph."""
    import onnx_ir as ir
    from onnx_ir.passes import common
    from onnxscript.optimizer import fold_constants_ir
    from onnxscript.rewriter import RewritePass

    class FoldConstants(ir.passes.InPlacePass):
        def call(self, model: ir.Model) -> ir.passes.PassResult:
            folded: ir.passes.PassResult = fold_constants_ir(model, onnx_shape_inference=True)
            return folded

    ir.passes.Sequential(
        common.InlinePass(),
        ir.passes.PassManager(
            [
                FoldConstants(),
                RewritePass(_rules()),
                common.RemoveUnusedNodesPass(),
                common.RemoveUnusedFunctionsPass(),  # type: ignore[no-untyped-call]
                common.RemoveUnusedOpsetsPass(),
            ],
            steps=_ROUNDS,
            early_stop=True,
        ),
        common.RemoveUnusedNodesPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.LiftSubgraphInitializersToMainGraphPass(),
        common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
        common.OutputFixPass(),
        common.NameFixPass(),
    )(model)


def _rules() -> list[RewriteRule]:
    from onnxscript.rewriter.rules import common

    def rule(name: str) -> RewriteRule:
        return getattr(common, f"{name}_rule")

    return [*(variant for name in _COMMUTING for variant in rule(name).commute()), *map(rule, _RULES)]
