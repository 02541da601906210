"""Everything that can be made of a scene in one pass: which files, what is in them, and that all of them are whole."""

from d2ls_infer.outputs.areas import AreaTally, ClassArea
from d2ls_infer.outputs.finished import STEPS, Finished
from d2ls_infer.outputs.options import OutputOptions
from d2ls_infer.outputs.sinks import Outputs, check_outputs

__all__ = ["STEPS", "AreaTally", "ClassArea", "Finished", "OutputOptions", "Outputs", "check_outputs"]
