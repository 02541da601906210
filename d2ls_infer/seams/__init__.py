"""How much a map depends on where its tiles lie. `seams.picture` draws it, and needs matplotlib."""

from d2ls_infer.seams.measure import SeamReport, Trial, measure_seams, try_overlaps

__all__ = ["SeamReport", "Trial", "measure_seams", "try_overlaps"]
