"""The server under load, beside a plain FastAPI application around transformers' `generate`.

    OMP_NUM_THREADS=1 PYTHONPATH=. python benchmarks/serve.py --run runs/digits --seconds 120

First the server is asked for all that it does, by `--clients` at a time: images (one to four, some
streamed), captions, infillings, searches. A fifth of the clients leave before their answer comes.
Three things are recorded: failures, whether the answers to a few fixed requests have the same bytes
every time, and the memory of the process each second.

Then the server and the plain application are asked in turn for images and captions only, and no
client leaves. The plain application has the same weights, exported to OPTForCausalLM, and the run's
own tokenizers. It takes one request at a time, with all of its samples in one batch. The ratio is
that of finished samples (images and captions) a second.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import io
import json
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
LEAVING = 0.2
"""Share of requests whose client leaves before the answer."""
FIXED = 12
"""Requests that come again and again, and whose answers are compared."""


@dataclass
class Load:
    """What the clients of a load have seen."""

    seconds: list[float] = field(default_factory=list)
    """Of each answer, from its request on."""
    samples: int = 0
    """Images and captions in the answers."""
    left: int = 0
    """Clients that left before their answer."""
    failures: Counter[str] = field(default_factory=Counter)
    """Requests without an answer, by HTTP status or kind of error."""
    bytes_of: dict[int, bytes] = field(default_factory=dict)
    """The first answer to each fixed request, by its key."""
    compared: int = 0
    """Later answers to fixed requests."""
    differing: int = 0
    """Those of them with other bytes than the first."""
    resident: list[int] = field(default_factory=list)
    """Bytes of the server, second by second."""
    wall: float = 0.0
    """Seconds of the whole load."""

    def row(self, name: str) -> str:
        """A row of the table."""
        p50, p95 = np.percentile(self.seconds, (50, 95))
        failures = sum(self.failures.values())
        return (
            f"| {name} | {len(self.seconds)} | {self.left} | {failures} "
            f"| {p50:.2f} | {p95:.2f} | {self.samples / self.wall:.1f} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=120, help="of the mixed load")
    parser.add_argument("--beside", type=float, default=30, help="seconds of each of both")
    parser.add_argument("--rounds", type=int, default=2, help="turns of both")
    parser.add_argument("--samples", type=int, default=16, help="of ours at a time")
    parser.add_argument("--plain", type=Path, help="be the plain application, of this export")
    parser.add_argument("--port", type=int, default=0)
    args = parser.parse_args()
    if args.plain:
        serve_plainly(args.plain, args.run, args.port)
        return

    with tempfile.TemporaryDirectory() as folder:
        exported = Path(folder) / "exported"
        command = ["-m", "cm3leon.run", "export", "to=hf", f"run={args.run}", f"out={exported}"]
        subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL)

        # Both run all the time; the one that is not asked is idle.
        ports = [free_port() for _ in range(2)]
        ours = ["-m", "cm3leon.run", "serve", f"run={args.run}", f"port={ports[0]}"]
        ours += [f"samples={args.samples}", "queue=1024"]
        plain = [__file__, "--plain", str(exported), "--run", str(args.run)]
        plain += ["--port", str(ports[1])]
        with started(ours, ports[0]) as pid, started(plain, ports[1]):
            load = asyncio.run(
                put_load(args, ports[0], args.seconds, mixed=True, leaving=LEAVING, pid=pid)
            )
            tell(load)
            report_beside(args, ports)


def tell(load: Load) -> None:
    """Print what the mixed load has seen."""
    print("| load | answers | left | failures | p50, s | p95, s | samples/s |")
    print("|---|---|---|---|---|---|---|")
    print(load.row("mixed"))

    # In the first fifth of the time buffers grow to their sizes.
    settled = load.resident[len(load.resident) // 5 :]
    print(
        f"\nfailures: {dict(load.failures)}; of {load.compared} answers to {FIXED} fixed requests "
        f"{load.differing} differed; resident memory after a fifth of the time "
        f"{settled[0] / 1e6:.0f} MB, at the end {settled[-1] / 1e6:.0f} MB, "
        f"at most {max(settled) / 1e6:.0f} MB\n"
    )


def report_beside(args: argparse.Namespace, ports: list[int]) -> None:
    """Put the same load on both in turn, and print the ratio of each round."""
    print("| images and captions | answers | left | failures | p50, s | p95, s | samples/s |")
    print("|---|---|---|---|---|---|---|")
    ratios = []
    for _ in range(args.rounds):
        rates = []
        for name, port in zip(("ours", "plain"), ports, strict=True):
            load = asyncio.run(put_load(args, port, args.beside, mixed=False, leaving=0.0))
            print(load.row(name), flush=True)
            rates.append(load.samples / load.wall)
        ratios.append(rates[0] / rates[1])

    shown = ", ".join(f"{ratio:.2f}" for ratio in ratios)
    print(f"\nsamples a second, ours over plain: {shown}; median {statistics.median(ratios):.2f}")


# ----------------------------------------------------------------------------------------- clients


async def put_load(
    args: argparse.Namespace,
    port: int,
    seconds: float,
    *,
    mixed: bool,
    leaving: float,
    pid: int | None = None,
) -> Load:
    """Let clients ask one request after the other, for so many seconds.

    Args:
        mixed: ask for all that the server does, and some requests again and again.
        leaving: share of requests whose client leaves before the answer.
        pid: process whose memory is recorded; None = none.
    """
    load, start = Load(), time.monotonic()
    limits = httpx.Limits(max_connections=args.clients, max_keepalive_connections=args.clients)
    async with httpx.AsyncClient(
        base_url=f"http://127.0.0.1:{port}", timeout=300, limits=limits
    ) as http:

        async def client(number: int) -> None:
            rng = random.Random(number)
            while time.monotonic() - start < seconds:
                # A fixed request is what a generator with one of a few seeds draws first.
                fixed = mixed and rng.random() < 0.2
                choice = random.Random(rng.randrange(FIXED)) if fixed else rng
                request = some_request(choice, mixed=mixed)
                key = request.pop("key")
                if not fixed:
                    key = None
                await ask(load, http, request, key, rng.random() < leaving, rng.random())

        watch = asyncio.create_task(watch_memory(load, pid)) if pid else None
        await asyncio.gather(*map(client, range(args.clients)))
        if watch:
            watch.cancel()

    load.wall = time.monotonic() - start
    return load


def some_request(rng: random.Random, *, mixed: bool) -> dict[str, Any]:
    """Draw a request: arguments of `http.post`, the number of its samples, and a key of its own."""
    seed = rng.randrange(2**31)
    weights = (5, 3, 1, 1) if mixed else (5, 3, 0, 0)
    (kind,) = rng.choices(("images", "caption", "fill", "search"), weights)
    prompt = f"a handwritten {rng.choice(DIGITS)}"
    if kind == "images":
        n = rng.randint(1, 4)
        body = {"prompt": prompt, "n": n, "seed": seed}
        if mixed:
            body |= {"retrieve": rng.randrange(3), "stream": rng.random() < 0.3}
        return {"path": "/v1/images/generations", "json": body, "samples": n, "key": seed}

    # There are twenty images, so that some are asked about by several clients at a time.
    image = picture(rng.randrange(20))
    if kind == "caption":
        url = f"data:image/png;base64,{base64.b64encode(image).decode()}"
        content = [{"type": "image_url", "image_url": {"url": url}}]
        body = {"messages": [{"role": "user", "content": content}], "max_tokens": 16, "seed": seed}
        return {"path": "/v1/chat/completions", "json": body, "samples": 1, "key": seed}
    if kind == "fill":
        data = {"prompt": prompt, "seed": str(seed), "box": "[0,16,32,32]"}
        form = {"data": data, "files": {"image": image}}
        return {"path": "/v1/images/edits", **form, "samples": 1, "key": seed}
    body = {"text": prompt, "count": 4}
    return {"path": "/v1/retrieve", "json": body, "samples": 0, "key": seed}


async def ask(
    load: Load,
    http: httpx.AsyncClient,
    request: dict[str, Any],
    key: int | None,
    leaves: bool,
    patience: float,
) -> None:
    """Ask, and record what comes.

    Args:
        key: names a fixed request; None = its answer is not compared.
        leaves: whether the client leaves after half a second times `patience`.
    """
    path, samples = request.pop("path"), request.pop("samples")
    started = time.monotonic()
    asked: Awaitable[httpx.Response] = http.post(path, **request)
    try:
        response = await (asyncio.wait_for(asked, 0.5 * patience) if leaves else asked)
    except TimeoutError:
        load.left += 1
        return
    except httpx.HTTPError as error:
        load.failures[type(error).__name__] += 1
        return

    # A stream has begun with 200 when an error comes.
    if response.status_code != 200 or b"event: error" in response.content:
        load.failures[str(response.status_code)] += 1
        return
    load.seconds.append(time.monotonic() - started)
    load.samples += samples
    if key is not None:
        content = comparable(response)
        load.compared += key in load.bytes_of
        load.differing += load.bytes_of.setdefault(key, content) != content


def comparable(response: httpx.Response) -> bytes:
    """The part of an answer that depends on the request alone."""
    if response.headers["content-type"].startswith("text/event-stream"):
        # How many images a stream shows on the way depends on the load, so only the last counts.
        answers = []
        for line in response.text.splitlines():
            if '.completed"' in line and "{" in line:
                answers.append(json.loads(line.removeprefix("data: ")))
    else:
        answers = [response.json()]

    # Times and names are new in each answer.
    for answer in answers:
        for changing in ("created", "created_at", "id"):
            answer.pop(changing, None)
    return json.dumps(answers).encode()


def picture(number: int) -> bytes:
    """A PNG file of 32 x 32 random pixels."""
    from PIL import Image

    pixels_HW = np.random.default_rng(number).integers(0, 256, (32, 32), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels_HW).save(file, "PNG")
    return file.getvalue()


async def watch_memory(load: Load, pid: int) -> None:
    """Record a process's resident bytes each second."""
    while True:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        resident = next(line for line in lines if line.startswith("VmRSS:"))
        load.resident.append(1024 * int(resident.split()[1]))
        await asyncio.sleep(1)


# ----------------------------------------------------------------------------------------- servers


@contextlib.contextmanager
def started(command: list[str], port: int) -> Iterator[int]:
    """Start a server as a process, wait until it answers, and end it afterwards."""
    with subprocess.Popen([sys.executable, *command], stdout=subprocess.DEVNULL) as process:
        try:
            while True:
                with contextlib.suppress(httpx.TransportError):
                    if httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200:
                        break
                if process.poll() is not None:
                    raise SystemExit(f"{command[0]} has ended with {process.returncode}")
                time.sleep(0.2)
            yield process.pid
        finally:
            process.terminate()


def free_port() -> int:
    """A port that nobody listened on a moment ago."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])


def serve_plainly(exported: Path, run: Path, port: int) -> None:
    """Serve as one would at first: FastAPI, a lock, and transformers' `generate`.

    Args:
        exported: folder that `export to=hf` wrote.
        run: the run folder, for its tokenizers.
    """
    import torch
    import uvicorn
    from decode import transformers_generate
    from fastapi import FastAPI
    from PIL import Image
    from transformers import OPTForCausalLM

    from cm3leon import CM3Leon
    from cm3leon.data.images import read_image
    from cm3leon.types import TokenDocument

    app, lock = FastAPI(), threading.Lock()
    tokenizers = CM3Leon.load(run)
    vocab, images = tokenizers.run.vocab, tokenizers.run.image_tokenizer
    model = OPTForCausalLM.from_pretrained(exported, torch_dtype=torch.bfloat16).eval()

    # A caption may have text and its end, no codes and no other special tokens.
    low, _ = vocab.id_range("image")
    no_text = [token for token in range(vocab.size) if token >= low or token < vocab.specials]
    no_text.remove(vocab.end_of_span)
    task: Callable[[str], Any] = tokenizers._task

    @app.get("/health")
    def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.post("/v1/images/generations")
    def generate(body: dict[str, Any]) -> dict[str, Any]:
        document = TokenDocument("a", (tokenizers._text(body["prompt"]), tokenizers._fresh))
        prompt = task("text_to_image").prompt(document)
        pair = (prompt.ids_T, prompt.unconditional_T)
        with lock:
            torch.manual_seed(body["seed"])
            ids_BT = transformers_generate(model, vocab, prompt.length, [pair] * body["n"])
            codes_BN = ids_BT[:, -prompt.length :].numpy() - low
            pixels_BHWC = images.decode(codes_BN)

        data = []
        for pixels_HWC in pixels_BHWC:
            file = io.BytesIO()
            Image.fromarray(pixels_HWC).save(file, "PNG")
            data.append({"b64_json": base64.b64encode(file.getvalue()).decode()})
        return {"data": data}

    @app.post("/v1/chat/completions")
    def caption(body: dict[str, Any]) -> dict[str, Any]:
        url = body["messages"][0]["content"][0]["image_url"]["url"]
        pixels_HWC = read_image(base64.b64decode(url.partition(",")[2]))
        with lock, torch.inference_mode():
            document = TokenDocument("a", (tokenizers._text(""), tokenizers._image(pixels_HWC)))
            prompt = task("caption").prompt(document)
            ids_T = model.generate(
                torch.from_numpy(prompt.ids_T)[None],
                attention_mask=torch.ones(1, len(prompt.ids_T), dtype=torch.int64),
                do_sample=False,
                max_new_tokens=body["max_tokens"],
                eos_token_id=vocab.end_of_span,
                suppress_tokens=no_text,
            )[0, len(prompt.ids_T) :]

        text = tokenizers.run.text_tokenizer.decode(ids_T[ids_T != vocab.end_of_span].numpy())
        return {"choices": [{"message": {"role": "assistant", "content": text}}]}

    uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning")


if __name__ == "__main__":
    main()
