"""How much a map depends on where its tiles lie. `seams.picture` draws it, and needs matplotlib."""

from d2ls_infer.seams.measure import SeamReport, measure_seams

__all__ = ["SeamReport", "measure_seams"]
