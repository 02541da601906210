"""Models from the hub, by the installed command and the real client: fetched once, whole, pinned, or one clear line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from d2ls_infer.weights import file_sha256, read_description, save_weights

FILE, REPO, TOKEN = "model.safetensors", "someone/toy", "hf_right"
Run = Callable[..., "subprocess.CompletedProcess[str]"]


def one_line(done: subprocess.CompletedProcess[str], code: int, *parts: str) -> str:
    """The error of a command that failed as it should: its last line, with these parts in it and no traceback."""
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    line = done.stderr.splitlines()[-1]
    assert line.startswith("Error: "), done.stderr
    for part in parts:
        assert part in line, (part, line)
    return line


def path_of(done: subprocess.CompletedProcess[str]) -> Path:
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.strip())


def leftovers(home: Path) -> list[Path]:
    """Files of downloads that did not end well."""
    return [path for path in home.rglob("*.incomplete*") if path.stat().st_size]


# First, second, again


def test_first_download_is_checked_and_the_second_asks_nobody(
    run: Run, hub: Any, home: Path, manifest: Path, tiny_weights: Path
) -> None:
    path = path_of(run("models", "download", "toy", "--manifest", manifest))
    assert path.read_bytes() == tiny_weights.read_bytes()
    assert home in path.parents
    assert hub.downloaded() == tiny_weights.stat().st_size
    hub.requests.clear()
    assert path_of(run("models", "download", "TOY", "--manifest", manifest)) == path
    assert hub.requests == []


def test_asked_for_again_it_is_fetched_again(run: Run, hub: Any, manifest: Path, tiny_weights: Path) -> None:
    path = path_of(run("models", "download", "toy", "--manifest", manifest))
    path.resolve().write_bytes(b"rotten")
    whole = tiny_weights.read_bytes()
    one_line(run("models", "download", "toy", "--manifest", manifest), 1, f"expected {len(whole)} bytes", "--force")
    assert path.read_bytes() == b"rotten"
    assert path_of(run("models", "download", "toy", "--manifest", manifest, "--force")) == path
    assert path.read_bytes() == whole


def test_all_models_are_fetched_at_once(
    run: Run, hub: Any, tmp_path: Path, tiny_weights: Path, entry_of: Callable[..., dict[str, Any]]
) -> None:
    entries = []
    for name in ("one", "two"):
        commit = hub.add(f"someone/{name}", {FILE: tiny_weights.read_bytes()})
        entries.append(entry_of(name=name, hub={"repo": f"someone/{name}", "revision": commit, "filename": FILE}))
    (tmp_path / "models.json").write_text(json.dumps({"version": 1, "models": entries}))
    done = run("models", "download", "--all", "--manifest", "models.json")
    assert done.returncode == 0, done.stderr
    paths = [Path(line) for line in done.stdout.splitlines()]
    assert sum("someone" in str(path) for path in paths) == 2
    assert all(path.is_file() for path in paths)
    listed = json.loads(run("models", "--json", "--manifest", "models.json").stdout)
    assert {entry["name"]: entry["where"] for entry in listed}["two"] == "cached"


# Interrupted, damaged, slow


def test_cut_connection_is_taken_up_where_it_ended(run: Run, hub: Any, tmp_path: Path, tiny_weights: Path) -> None:
    """The client keeps what came in whole chunks of 10 MB. Before its version 2 it goes on only when asked again."""
    chunk = 10 << 20
    large = tmp_path / "large.safetensors"
    save_weights(large, {"large": torch.zeros(chunk // 4 + 500_000)}, read_description(tiny_weights))
    hub.add(REPO, {FILE: large.read_bytes()})
    hub.faults.cut = [chunk + 1_000_000]
    done = run("models", "download", REPO)
    path = path_of(done if done.returncode == 0 else run("models", "download", REPO))
    assert path.read_bytes() == large.read_bytes()
    first, second = (request.headers.get("Range") for request in hub.requests if request.server == "storage")
    assert first is None
    assert int(second.removeprefix("bytes=").removesuffix("-")) >= chunk


def test_file_of_other_bytes_is_refused_and_kept(run: Run, hub: Any, manifest: Path, tiny_weights: Path) -> None:
    other = bytearray(tiny_weights.read_bytes())
    other[-1] ^= 1
    hub.faults.content = bytes(other)
    line = one_line(run("models", "download", "toy", "--manifest", manifest), 1, "expected", "found", "nothing was del")
    assert file_sha256(tiny_weights) in line
    assert "--force" in line


def test_file_of_another_size_is_refused_before_it_is_fetched(
    run: Run, hub: Any, manifest: Path, tiny_weights: Path
) -> None:
    hub.faults.headers = {"X-Linked-Size": "7"}
    size = tiny_weights.stat().st_size
    one_line(run("models", "download", "toy", "--manifest", manifest), 1, "7 bytes", f"{size} were expected")
    assert hub.downloaded() == 0


def test_truncated_file_is_refused(run: Run, hub: Any, manifest: Path, tiny_weights: Path) -> None:
    hub.faults.content = tiny_weights.read_bytes()[:1000]
    one_line(run("models", "download", "toy", "--manifest", manifest), 1, "someone/toy@", "1000")
    one_line(run("models", "path", "toy", "--manifest", manifest), 2, "not in the cache")
    hub.faults.content = None
    path = path_of(run("models", "download", "toy", "--manifest", manifest))
    assert path.read_bytes() == tiny_weights.read_bytes()


def test_slow_hub_is_told_with_what_makes_it_wait_longer(run: Run, hub: Any, manifest: Path) -> None:
    hub.faults.delay_s = 4.0
    started = time.monotonic()
    done = run("models", "download", "toy", "--manifest", manifest, HF_HUB_ETAG_TIMEOUT="1")
    one_line(done, 1, hub.url, "did not answer in time", "HF_HUB_ETAG_TIMEOUT", "now 1 and")
    assert time.monotonic() - started < 20


def test_failing_hub_is_told(run: Run, hub: Any, manifest: Path) -> None:
    hub.faults.status = 503
    one_line(run("models", "download", "toy", "--manifest", manifest), 1, hub.url, "503")


def test_two_processes_at_once_end_with_one_good_file(
    command: str, environment: dict[str, str], hub: Any, home: Path, manifest: Path, tiny_weights: Path
) -> None:
    arguments = [command, "models", "download", "toy", "--manifest", str(manifest)]
    both = [
        subprocess.Popen(arguments, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    texts = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0], texts
    first, second = (Path(text[0].strip()) for text in texts)
    assert first == second
    assert first.read_bytes() == tiny_weights.read_bytes()
    assert leftovers(home) == []


def test_interrupted_command_leaves_nothing_that_is_taken_for_whole(
    command: str, environment: dict[str, str], run: Run, hub: Any, manifest: Path, tiny_weights: Path
) -> None:
    hub.faults.stall_s = 60.0
    arguments = [command, "models", "download", "toy", "--manifest", str(manifest)]
    process = subprocess.Popen(arguments, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not any(request.server == "storage" for request in hub.requests) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode != 0
    hub.faults.stall_s = 0.0
    path = path_of(run("models", "download", "toy", "--manifest", manifest))
    assert path.read_bytes() == tiny_weights.read_bytes()


# Who may


@pytest.fixture
def private(hub: Any, manifest: Path) -> None:
    hub.repos[REPO].private = True


@pytest.mark.usefixtures("private")
def test_private_model_needs_a_token(run: Run, manifest: Path) -> None:
    done = run("models", "download", "toy", "--manifest", manifest)
    one_line(done, 2, f"no repository {REPO}, or it is private", "HF_TOKEN")
    done = run("models", "download", "toy", "--manifest", manifest, HF_TOKEN="hf_wrong")
    one_line(done, 1, f"refused {REPO}", "your token does not open it")


@pytest.mark.usefixtures("private")
def test_token_opens_a_private_model_and_is_shown_to_the_hub_alone(run: Run, hub: Any, manifest: Path) -> None:
    path_of(run("models", "download", "toy", "--manifest", manifest, HF_TOKEN=TOKEN))
    shown = {(request.server, request.headers.get("authorization") is not None or "Authorization" in request.headers)
             for request in hub.requests}  # fmt: skip
    assert shown == {("hub", True), ("storage", False)}


def test_model_that_is_opened_on_request_says_where_to_ask(run: Run, hub: Any, manifest: Path) -> None:
    hub.repos[REPO].gated = True
    for variables, why in (({}, "no token is set"), ({"HF_TOKEN": TOKEN}, "your token does not open it")):
        done = run("models", "download", "toy", "--manifest", manifest, **variables)
        one_line(done, 1, f"ask at {hub.url}/{REPO}", why)


# References


def test_repository_without_a_manifest_is_resolved_and_told(run: Run, hub: Any, tiny_weights: Path) -> None:
    commit = hub.add(REPO, {FILE: tiny_weights.read_bytes()})
    done = run("models", "download", REPO)
    path = path_of(done)
    assert path.parent.name == commit
    assert f"{REPO}@{commit}:{FILE}, sha256 {file_sha256(tiny_weights)}" in done.stderr
    newer = hub.add(REPO, {FILE: tiny_weights.read_bytes() + b"", "more.txt": b"more"})
    assert path_of(run("models", "download", REPO)).parent.name == newer
    hub.requests.clear()
    assert path_of(run("models", "download", f"{REPO}@{commit}:{FILE}")) == path
    assert hub.requests == []


def test_file_of_another_name_is_asked_for_by_it(run: Run, hub: Any, tiny_weights: Path) -> None:
    commit = hub.add(REPO, {"roads.safetensors": tiny_weights.read_bytes()})
    one_line(run("models", "download", REPO), 2, f"no file {FILE} at main", f"{REPO}@main:FILE.safetensors")
    path = path_of(run("models", "download", f"{REPO}:roads.safetensors"))
    assert (path.name, path.parent.name) == ("roads.safetensors", commit)


@pytest.mark.parametrize(
    ("reference", "parts"),
    [
        ("someone/none", ["no such file: someone/none, and", "no repository someone/none"]),
        (f"{REPO}@v9", [f"{REPO} on", "no revision 'v9'"]),
        (f"{REPO}@{'0' * 40}", ["no revision '000"]),
        (f"{REPO}@../../main", ["no such weights file"]),
        (f"{REPO}:../model.safetensors", ["no such weights file"]),
        (f"{REPO}:model.ckpt", ["no such weights file"]),
        ("../someone/toy", ["no such weights file"]),
        ("someone/../toy", ["no such weights file"]),
        ("runs/none.safetensors", ["no such weights file"]),
    ],
)
def test_reference_to_nothing_is_told(run: Run, hub: Any, reference: str, parts: list[str]) -> None:
    hub.add(REPO, {FILE: b"x"})
    one_line(run("models", "download", reference), 2, *parts)


def test_file_that_is_no_model_is_told(run: Run, hub: Any) -> None:
    hub.add(REPO, {FILE: b"not a model"})
    one_line(run("models", "download", REPO), 1, "is not a safetensors file")


# A hub that means harm


@pytest.mark.parametrize("header", ["X-Repo-Commit", "X-Linked-Etag"])
def test_names_from_the_network_never_become_paths(
    run: Run, hub: Any, home: Path, tmp_path: Path, manifest: Path, header: str
) -> None:
    hub.faults.headers = {header: "../../../../escaped"}
    before = sorted(path for path in tmp_path.rglob("*") if home not in path.parents)
    one_line(run("models", "download", REPO), 1, "is no hub", "escaped")
    one_line(run("models", "download", "toy", "--manifest", manifest), 1, "escaped")
    assert sorted(path for path in tmp_path.rglob("*") if home not in path.parents and path != home) == before
    assert not any("escaped" in str(path) for path in tmp_path.rglob("*"))
    assert hub.downloaded() == 0


def test_another_commit_than_the_pinned_one_is_refused(run: Run, hub: Any, manifest: Path) -> None:
    hub.faults.headers = {"X-Repo-Commit": "f" * 40}
    one_line(run("models", "download", "toy", "--manifest", manifest), 1, "answered with commit fff")


# Without a network


def test_offline_tells_what_is_missing_and_how_to_get_it(run: Run, hub: Any, manifest: Path) -> None:
    for arguments, variables in ((["--offline"], {}), ([], {"HF_HUB_OFFLINE": "1"})):
        done = run("predict", "scene.tif", "--model", "toy", "--manifest", manifest, *arguments, **variables)
        one_line(done, 2, f"{REPO}@", FILE, "not in the cache", "d2ls models download toy")
    one_line(run("models", "path", "toy", "--manifest", manifest), 2, "d2ls models download toy")
    for command in (["evaluate", "--model"], ["train", "--init"]):
        done = run(*command, "toy", "--dataset", "vaihingen", "--manifest", manifest, "--offline")
        one_line(done, 2, "not in the cache", "d2ls models download toy")
    assert hub.requests == []


def test_offline_takes_what_was_fetched_before(run: Run, hub: Any, manifest: Path) -> None:
    path = path_of(run("models", "download", "toy", "--manifest", manifest))
    main = path_of(run("models", "download", REPO))
    hub.requests.clear()
    assert path_of(run("models", "path", "toy", "--manifest", manifest)) == path
    assert path_of(run("models", "path", REPO)) == main
    assert path_of(run("models", "download", "toy", "--manifest", manifest, HF_HUB_OFFLINE="1")) == path
    assert hub.requests == []


def test_unreachable_hub_is_told_at_once_and_the_cache_still_works(run: Run, hub: Any, manifest: Path) -> None:
    nowhere = "http://127.0.0.1:9"  # the discard port: nobody listens
    started = time.monotonic()
    done = run("models", "download", "toy", "--manifest", manifest, HF_ENDPOINT=nowhere)
    one_line(done, 1, f"{nowhere} cannot be reached")
    assert time.monotonic() - started < 20  # the client alone would try for longer
    path_of(run("models", "download", "toy", "--manifest", manifest))
    main = path_of(run("models", "download", REPO))
    path_of(run("models", "download", "toy", "--manifest", manifest, HF_ENDPOINT=nowhere))
    done = run("models", "download", REPO, HF_ENDPOINT=nowhere)
    assert path_of(done) == main
    assert "cannot be reached" in done.stderr
    assert "taking what is in the cache" in done.stderr


@pytest.mark.skipif(os.name == "nt", reason="symbolic links are what Windows lacks anyway")
def test_cache_without_links_works(run: Run, hub: Any, manifest: Path, tiny_weights: Path) -> None:
    path = path_of(run("models", "download", "toy", "--manifest", manifest, HF_HUB_DISABLE_SYMLINKS="1"))
    assert path.read_bytes() == tiny_weights.read_bytes()
    assert path_of(run("models", "path", "toy", "--manifest", manifest)) == path
