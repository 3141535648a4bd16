"""The run's record as tables to print."""

from __future__ import annotations

from rich.table import Table

from lightning_ptq.refinement import AllocationResult


def allocation_table(result: AllocationResult) -> Table:
    """Each layer's widths, its sensitivity with standard error, and how sure the choice is."""
    allocation, sensitivity = result.allocation, result.sensitivity
    costs = ", ".join(f"{name} {total:.6g}" for name, total in allocation.costs.items())
    proof = "proven optimal" if allocation.proven else f"within {allocation.gap:.2%} of the bound"
    predicted = sensitivity.predict(allocation.choice)
    title = (
        f"Bit allocation: {costs} ({allocation.solver}, {proof})\n{sensitivity.measure} predicted {predicted:.4g},"
        f" measured {result.measured:.4g}, all at base {sensitivity.base_value:.4g}"
    )
    table = Table("layer", "widths", "rise", "± standard error", "kept in redraws", title=title)
    for name, candidate in allocation.choice.items():
        error = sensitivity.errors.get(name, {}).get(candidate, float("nan"))
        stable = f"{result.stability[name]:.0%}" if name in result.stability else "-"
        table.add_row(name, candidate, f"{sensitivity.rises[name][candidate]:.2e}", f"{error:.0e}", stable)
    return table
