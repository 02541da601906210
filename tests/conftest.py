"""What the tests share: segmenters that need no network, rasters made on the fly, a map read back whole."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.request import urlopen
from xml.etree import ElementTree

import numpy as np
import pytest
import rasterio
import torch
from affine import Affine
from hypothesis import settings
from rasterio.errors import NotGeoreferencedWarning
from torch import Tensor

from d2ls_infer.labels import LabelMap

# Examples build rasters and tensors; how long that takes says nothing about a law. The same examples on every run.
settings.register_profile("d2ls", deadline=None, derandomize=True, max_examples=100)
settings.load_profile("d2ls")

# Tests run in two processes on perhaps two cores: each has one thread, and so has what it starts.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    """Say how a process of tests ended that fell over, which is all that there is to be learnt of it."""
    if error:
        ended = "has not ended"
        with suppress(subprocess.TimeoutExpired):
            ended = f"ended with {node.gateway._io.popen.wait(10)}"
        node.config.get_terminal_writer().line(f"\n{node.gateway.id} {ended}", red=True)


NAMES = ("water", "forest", "field", "road", "roof")
UTM = "EPSG:32618"
NORTH_UP = Affine(2.0, 0.0, 500_000.0, 0.0, -2.0, 4_600_000.0)


sys.path.insert(0, str(Path(__file__).parent / "cluster"))  # other processes take it over, and import the toys there


class Fake:
    """A segmenter by the protocol, without a network. `scored` counts the tiles, `batches` lists how they came."""

    def __init__(self, classes: int = 3, bands: int = 3, *, value_range: tuple[float, float] | None = None) -> None:
        self.labels = LabelMap.of(NAMES[:classes])
        self.bands = tuple(f"band {i + 1}" for i in range(bands))
        self.value_range = value_range
        self.scored = 0
        self.batches: list[int] = []

    def score(self, batch: Tensor) -> Tensor:
        assert batch.dtype in (torch.uint8, torch.float32)
        assert batch.shape[1] == len(self.bands)
        self.scored += len(batch)
        self.batches.append(len(batch))
        return self.scores(batch)

    def scores(self, batch: Tensor) -> Tensor:
        raise NotImplementedError

    def one_hot(self, index: Tensor) -> Tensor:
        """(B, H, W) class indices -> (B, K, H, W)."""
        return (torch.arange(len(self.labels)).view(1, -1, 1, 1) == index[:, None]).float()


class Constant(Fake):
    """Class `index` everywhere."""

    index = 1

    def scores(self, batch: Tensor) -> Tensor:
        return self.one_hot(torch.full_like(batch[:, 0], self.index, dtype=torch.int64))


class PerPixel(Fake):
    """The first band's value, rounded down, modulo the number of classes: a function of each pixel alone."""

    def scores(self, batch: Tensor) -> Tensor:
        return self.one_hot(batch[:, 0].float().floor().remainder(len(self.labels)))


class Identity(Fake):
    """As many classes as bands; the band with the largest value wins."""

    def scores(self, batch: Tensor) -> Tensor:
        return batch.float()


class TileMean(Fake):
    """Scores that depend on the whole tile, as those of a network do."""

    def scores(self, batch: Tensor) -> Tensor:
        index = batch[:, 0].float().floor().remainder(len(self.labels))
        return self.one_hot(index) + batch.float().amax((1, 2, 3)).view(-1, 1, 1, 1) * torch.linspace(
            0, 0.01, len(self.labels)
        ).view(1, -1, 1, 1)


class Failing(Fake):
    """Gives scores for `tiles` tiles, then raises `error`."""

    def __init__(self, error: BaseException, tiles: int = 2) -> None:
        super().__init__()
        self.error, self.tiles = error, tiles

    def scores(self, batch: Tensor) -> Tensor:
        if self.scored > self.tiles:
            raise self.error
        return torch.zeros(len(batch), len(self.labels), *batch.shape[-2:])


@pytest.fixture(scope="session", autouse=True)
def no_models_of_the_users_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What a manifest on this machine names is none of the tests' business."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("D2LS_MANIFEST", raising=False)
        patch.setenv("XDG_CONFIG_HOME", str(tmp_path_factory.mktemp("config")))
        yield


@pytest.fixture(scope="session")
def forked() -> Iterator[Any]:
    """What starts processes that have loaded everything, in a moment; while it is there, workers of Dask too."""
    dask = pytest.importorskip("dask")
    pytest.importorskip("distributed")
    from multiprocessing import forkserver

    # Dask would have it load less, but it is running by then.
    multiprocessing.set_forkserver_preload(
        ["distributed", "d2ls_infer.cluster.worker", "d2ls_infer.cli.predict", "rasterio", "cluster_toys"]
    )
    forkserver.ensure_running()
    with dask.config.set({"distributed.worker.multiprocessing-method": "forkserver"}):
        yield multiprocessing.get_context("forkserver")


@pytest.fixture(scope="session")
def fakes() -> SimpleNamespace:
    """The fake segmenters, by name."""
    return SimpleNamespace(
        Fake=Fake, Constant=Constant, PerPixel=PerPixel, Identity=Identity, TileMean=TileMean, Failing=Failing
    )


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data beside the project, where there is one."""
    folder = Path(__file__).resolve().parents[1] / "../shared"
    if not folder.is_dir():
        pytest.skip("needs the folder of real data, `shared` beside the project")
    return folder


@pytest.fixture(scope="session")
def pixels() -> Callable[..., np.ndarray]:
    """(bands, height, width) of random values of a type, the same ones for the same arguments."""

    def make(bands: int, height: int, width: int, dtype: str = "uint8", low: int = 1, high: int = 250) -> np.ndarray:
        random = np.random.default_rng([bands, height, width])
        return random.integers(low, high, (bands, height, width)).astype(dtype)

    return make


@pytest.fixture(scope="session")
def write_raster() -> Callable[..., Path]:
    """Write (bands, H, W) as a raster; a GeoTIFF in UTM unless told otherwise. `georeferenced=False`: a plain image."""

    def write(
        path: Path, array: np.ndarray, *, mask: np.ndarray | None = None, georeferenced: bool = True, **profile: Any
    ) -> Path:
        if georeferenced:
            profile = {"crs": UTM, "transform": NORTH_UP} | profile
        bands, height, width = array.shape
        colorinterp = profile.pop("colorinterp", None)
        colormap = profile.pop("colormap", None)
        with warnings.catch_warnings(), rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True):
            warnings.simplefilter("ignore", NotGeoreferencedWarning)
            with rasterio.open(
                path,
                "w",
                **{"driver": "GTiff", "dtype": array.dtype} | profile,
                count=bands,
                height=height,
                width=width,
            ) as dataset:
                if colorinterp is not None:
                    dataset.colorinterp = colorinterp
                if colormap is not None:
                    dataset.write_colormap(1, colormap)
                dataset.write(array)
                if mask is not None:
                    dataset.write_mask(mask)
        return path

    return write


@pytest.fixture(scope="session")
def read_map() -> Callable[[Path], SimpleNamespace]:
    """A class map read back with everything that is said of it, in its own file and in the sidecar."""

    def read(path: Path) -> SimpleNamespace:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NotGeoreferencedWarning)
            with rasterio.open(path) as dataset:
                found = SimpleNamespace(
                    array=dataset.read(1),
                    count=dataset.count,
                    dtype=dataset.dtypes[0],
                    crs=dataset.crs,
                    transform=dataset.transform,
                    gcps=dataset.gcps,
                    nodata=dataset.nodata,
                    colormap=dataset.colormap(1),
                    tags=dataset.tags(),
                    band_tags=dataset.tags(1),
                    description=dataset.descriptions[0],
                    profile=dataset.profile,
                    block=dataset.block_shapes[0],
                )
        root = ElementTree.parse(path.with_name(path.name + ".aux.xml")).getroot()
        assert root.tag == "PAMDataset"
        band = root.find("PAMRasterBand[@band='1']")
        assert band is not None
        found.categories = [item.text for item in band.findall("CategoryNames/Category")]
        return found

    return read


@pytest.fixture(scope="session")
def web_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """A folder on loopback, served with byte ranges; see `range_server.py`. The folder, and its address."""
    folder = tmp_path_factory.mktemp("web")
    command = [sys.executable, str(Path(__file__).with_name("range_server.py")), str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        yield folder, f"http://127.0.0.1:{int(server.stdout.readline())}"
        server.terminate()


@pytest.fixture
def web(web_server: tuple[Path, str], request: pytest.FixtureRequest) -> SimpleNamespace:
    """A folder of its own for a test, since GDAL remembers what it has seen of an address.

    `folder` is served at `address`; `sent()` gives the bytes, and `requests()` the number of requests, since either was
    last asked.
    """
    root, address = web_server
    name = re.sub(r"\W", "", request.node.name)
    (root / name).mkdir()

    def log() -> list[tuple[str, str, int]]:
        with urlopen(f"{address}/-/log") as answer:
            return list(json.load(answer))

    return SimpleNamespace(
        folder=root / name,
        address=f"{address}/{name}",
        root=address,
        name=name,
        sent=lambda: sum(size for *_, size in log()),
        requests=lambda: len(log()),
    )


@pytest.fixture(scope="session")
def s3_server() -> Iterator[dict[str, str]]:
    """An S3 server on loopback: what a process has in its environment to reach it."""
    pytest.importorskip("s3fs")
    server = pytest.importorskip("moto.server").ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    address = "http://{}:{}".format(*server.get_host_and_port())
    yield {
        "AWS_ENDPOINT_URL": address,
        "AWS_ACCESS_KEY_ID": "somebody",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    server.stop()


@pytest.fixture
def staging(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder in which outputs for object stores are made."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def bucket(
    s3_server: dict[str, str], staging: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> SimpleNamespace:
    """A new bucket: its `address`, the `environment` that leads to it, and `objects()`: their bytes, by their keys."""
    import s3fs

    for name, value in s3_server.items():
        monkeypatch.setenv(name, value)
    store = s3fs.S3FileSystem()
    name = re.sub(r"[^a-z0-9]+", "-", request.node.name.lower()).strip("-")[:63].strip("-")
    store.mkdir(name)

    def objects() -> dict[str, bytes]:
        store.invalidate_cache()
        return {path.removeprefix(f"{name}/"): store.cat_file(path) for path in store.find(name)}

    return SimpleNamespace(address=f"s3://{name}", environment=s3_server, objects=objects, store=store)


@pytest.fixture(scope="session")
def tiny_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A weights file of a small D2LS with random weights, for three bands of 0..255 and four classes."""
    from d2ls_infer.manifest import ModelDescription
    from d2ls_infer.nn import D2LS, D2LSConfig, weights_of
    from d2ls_infer.weights import save_weights

    config = D2LSConfig(backbone="mobilenetv3_small_050", num_classes=4, embed_dim=32, stages=1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = D2LS(config).eval()
    description = ModelDescription(
        config=config.to_dict(),
        labels=LabelMap.of(NAMES[:4]),
        bands=("red", "green", "blue"),
        value_range=(0.0, 255.0),
        mean=(0.4, 0.5, 0.6),
        std=(0.2, 0.25, 0.3),
        gsd_m=None,
        metrics=(),
        license="CC0-1.0",
        training_data="none",
        source="random numbers",
    )
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    save_weights(path, weights_of(network), description)
    return path


@pytest.fixture(scope="session")
def cpu_only() -> Iterator[None]:
    """Training on the CPU even where there is a faster device: only there is it the same to the last bit."""
    from lightning.pytorch.accelerators import CUDAAccelerator, MPSAccelerator

    with pytest.MonkeyPatch.context() as patch:
        for accelerator in (CUDAAccelerator, MPSAccelerator):
            patch.setattr(accelerator, "is_available", staticmethod(lambda: False))
        yield


@pytest.fixture(scope="session")
def backbone_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier of timm, mobilenetv3_small_050, with random weights, as its hub holds them."""
    import timm
    from safetensors.torch import save_file

    path = tmp_path_factory.mktemp("backbone") / "model.safetensors"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        save_file(timm.create_model("mobilenetv3_small_050").state_dict(), path)
    return path


@pytest.fixture(scope="session")
def toys(tmp_path_factory: pytest.TempPathFactory, write_raster: Callable[..., Path]) -> Path:
    """images/ and masks/ of five GeoTIFFs of 48 x 40 pixels and three classes, in train.txt and val.txt.

    Their brightness is their class, and three columns are not labelled.
    """
    root = tmp_path_factory.mktemp("toys")
    rng = np.random.default_rng(1)
    for kind in ("images", "masks"):
        (root / kind).mkdir()
    for name in "abcde":
        mask = rng.integers(0, 3, (6, 5), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
        image = np.clip(20 + 110.0 * mask + rng.normal(0, 8, (3, 48, 40)), 0, 255).astype(np.uint8)
        mask[:, :3] = 255
        write_raster(root / "images" / f"{name}.tif", image)
        write_raster(root / "masks" / f"{name}.tif", mask[None])
    (root / "train.txt").write_text("a\nb\nc\n")
    (root / "val.txt").write_text("d\ne\n")
    return root


@pytest.fixture
def scene_with_holes(tmp_path: Path, write_raster: Callable[..., Path], pixels: Callable[..., np.ndarray]) -> Path:
    """300 x 70 pixels with holes and rows of nodata, alone in a folder."""
    array = np.kron(pixels(3, 60, 14), np.ones((1, 5, 5), np.uint8))
    array[:, 100:140] = 0
    array[:, :, 20:30] = 0
    return write_raster(tmp_path / "scene.tif", array, nodata=0)
