"""`python -m d2ls_infer` is `d2ls`."""

from d2ls_infer.cli import main

main(prog_name="d2ls")
