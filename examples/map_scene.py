"""Map a scene and print what it holds: python examples/map_scene.py [SCENE] [MODEL]"""

import sys
from pathlib import Path

from d2ls_infer import load_model, predict_raster

scene = sys.argv[1] if len(sys.argv) > 1 else Path(__file__).with_name("naip_scene.tif")
model = load_model(sys.argv[2] if len(sys.argv) > 2 else "naip")
result = predict_raster(model, scene, overwrite=True)
print(f"{result.output}: {result.tiles} tiles in {result.seconds['total']:.1f} s")
for area in result.areas:
    print(f"{area.name:>20}: {area.area_m2 / 1e4:8.2f} ha, {100 * area.share:5.1f} %")
