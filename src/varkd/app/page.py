"""The page of `varkd app`: controls to the left, a row of pictures for each model to the right."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # before Gradio is imported: nothing leaves the machine
import gradio as gr
from gradio.themes import Default

from varkd.app.playground import Candidate, Playground, Shown
from varkd.backbones.protocol import SlotDecoder
from varkd.errors import VarkdError
from varkd.rollout import Sampler

ALL_CLASSES = "all classes"
_CSS = """
.gradio-container { max-width: 1500px !important; }
.images { display: grid; grid-template-columns: repeat(auto-fill, minmax(84px, 1fr)); gap: 4px; }
.images figure { margin: 0; text-align: center; font-size: 12px; }
.images img { width: 100%; image-rendering: pixelated; }
footer { display: none !important; }
"""


def launch(
    folders: Sequence[Path], *, host: str = "127.0.0.1", port: int = 7860, device: str = "auto", block: bool = True
) -> str:
    """`varkd app`: serve the page until Ctrl-C; with `block` False return its address at once.

    Raises:
        VarkdError: models that do not fit together, or a port that is taken.
    """
    page = build(Playground(folders, device))
    theme = Default(font=("system-ui", "sans-serif"), font_mono=("ui-monospace", "monospace"))
    try:
        _, address, _ = page.launch(
            server_name=host,
            server_port=port,
            prevent_thread_lock=not block,
            quiet=not block,
            theme=theme,
            css=_CSS,
            footer_links=[],
            share=False,
        )
    except OSError as error:
        raise VarkdError(f"cannot serve on {host}:{port} (is the port taken?): choose another --port") from error
    return address


def build(playground: Playground) -> gr.Blocks:
    """The page with all its controls wired up."""
    with gr.Blocks(title="varkd", analytics_enabled=False) as page:
        gr.Markdown("# varkd\nThe same labels and the same noise for every model: what differs is the model.")
        with gr.Row():
            with gr.Column(scale=1, min_width=250):
                settings = _settings(playground)
            with gr.Column(scale=3, min_width=310):
                with gr.Tab("Samples"):
                    codes = _samples_tab(playground, settings)
                with gr.Tab("Continue"):
                    _continue_tab(playground, settings)
                with gr.Tab("Nearest"):
                    _nearest_tab(playground, codes)
    return page


def _settings(playground: Playground) -> list[Any]:
    """Label, number, seed, then the sampler's: in the order of `_sampler` and the handlers."""
    usual = playground.sampler
    label = gr.Dropdown([ALL_CLASSES, *playground.class_names], value=ALL_CLASSES, label="Class")
    num = gr.Slider(1, 32, value=8, step=1, label="Images")
    seed = gr.Number(0, precision=0, label="Seed")
    gr.Button("New seed", size="sm").click(lambda value: (int(value) + 1) % 2**31, seed, seed)
    temperature = gr.Slider(0, 1.5, value=usual.temperature, step=0.05, label="Temperature (0 is greedy)")
    guidance = gr.Slider(1, 10, value=usual.guidance, step=0.25, label="Guidance (1 is off)")
    top_k = gr.Slider(0, playground.tokenizer.vocab_size, value=usual.top_k, step=1, label="Top-k (0 keeps all)")
    top_p = gr.Slider(0.05, 1, value=usual.top_p, step=0.05, label="Top-p (1 keeps all)")
    models = [candidate.model for candidate in playground.candidates]
    in_rows = any(isinstance(model, SlotDecoder) for model in models)
    width = playground.codes.manifest["grid"][1]
    window = gr.Slider(0, width, value=0, step=1, label="ZipAR window (0 decodes code by code)", visible=in_rows)
    any_order = any(model.family in ("arpg", "randar") for model in models)
    steps = gr.Slider(
        0,
        playground.tokenizer.sequence_length,
        value=usual.steps or 0,
        step=1,
        label="Decoding steps (0 decodes code by code)",
        visible=any_order,
    )
    return [label, num, seed, temperature, guidance, top_k, top_p, window, steps]


def _sampler(
    playground: Playground, temperature: float, guidance: float, top_k: float, top_p: float, window: float, steps: float
) -> Sampler:
    parallel: dict[str, Any] = {"parallel": "zipar", "window": int(window)} if window else {"parallel": "off"}
    return replace(
        playground.sampler,
        temperature=temperature,
        guidance=guidance,
        top_k=int(top_k),
        top_p=top_p,
        steps=int(steps) or None,
        **parallel,
    )


def _samples_tab(playground: Playground, settings: list[Any]) -> gr.State:
    codes = gr.State([])
    button = gr.Button("Sample", variant="primary")
    outputs = _rows(playground.candidates)

    def sample(label: str, num: float, seed: float, *sampler: float) -> list[Any]:
        chosen = None if label == ALL_CLASSES else playground.class_names.index(label)
        shown = _told(partial(playground.sample, chosen, int(num), int(seed)), playground, sampler)
        return [[each.codes_NL for each in shown], *map(_html, shown)]

    button.click(sample, settings, [codes, *outputs])
    return codes


def _continue_tab(playground: Playground, settings: list[Any]) -> None:
    with gr.Row():
        image = gr.Image(type="pil", label="Image (yours, or one of the validation split)", height=220, min_width=200)
        with gr.Column(min_width=200):
            drawn = gr.Number(-1, visible=False, precision=0)
            another = gr.Button("An image of the validation split")
            share = gr.Slider(0, 0.95, value=0.5, step=0.05, label="Share of its codes that is kept")
            button = gr.Button("Continue it", variant="primary")
    gr.HTML("<h3>The image as its codes show it</h3>")
    seen = gr.HTML()
    outputs = _rows(playground.candidates)

    def pick(index: float) -> tuple[int, Image.Image, str]:
        pixels, label = playground.example(int(index) + 1)
        return int(index) + 1, Image.fromarray(_rgb(pixels)), playground.class_names[label]

    def go_on(picture: Image.Image | None, kept: float, label: str, num: float, seed: float, *sampler: float) -> list:
        if picture is None:
            raise gr.Error("Upload an image first, or take one of the validation split.")
        chosen = 0 if label == ALL_CLASSES else playground.class_names.index(label)
        if label == ALL_CLASSES and len(playground.class_names) > 1:
            raise gr.Error("Choose the class that the image is continued as.")
        made: list[NDArray[np.uint8]] = []

        def continued(settings_: Sampler) -> list[Shown]:
            reconstruction, shown = playground.continued(picture, chosen, kept, int(num), int(seed), settings_)
            made.append(reconstruction)
            return shown

        shown = _told(continued, playground, sampler)
        return [_grid(made[0][None]), *map(_html, shown)]

    another.click(pick, drawn, [drawn, image, settings[0]])
    button.click(go_on, [image, share, *settings], [seen, *outputs])


def _nearest_tab(playground: Playground, codes: gr.State) -> None:
    names = [candidate.name for candidate in playground.candidates]
    gr.Markdown(
        "The training images nearest to a sample, by the distance between codebook vectors, position by "
        "position; 0 is a copy. Sample first."
    )
    with gr.Row():
        which = gr.Dropdown(names, value=names[0], label="Model", min_width=150)
        number = gr.Number(1, precision=0, minimum=1, label="Sample", min_width=100)
        button = gr.Button("Find", variant="primary", min_width=100)
    found = gr.HTML()

    def find(name: str, index: float, drawn: list[Any]) -> str:
        codes_NL = drawn[names.index(name)] if drawn else None
        if codes_NL is None:
            raise gr.Error("Draw samples of this model first (the first tab).")
        if not 1 <= index <= len(codes_NL):
            raise gr.Error(f"There are samples 1 to {len(codes_NL)}.")
        sample_1L = codes_NL[int(index) - 1 : int(index)]
        images, distances = playground.nearest(sample_1L[0])
        captions = ["the sample", *(f"{distance:.3f}" for distance in distances)]
        return _grid(np.concatenate([playground.decoded(sample_1L), images]), captions)

    button.click(find, [which, number, codes], found)


def _rows(candidates: Sequence[Candidate]) -> list[Any]:
    """A heading and a place for pictures for every model; returns the places."""
    places: list[Any] = []
    for candidate in candidates:
        about = f"{candidate.model.family}, {_count(candidate.parameters)} parameters"
        gr.HTML(f"<h3>{escape(candidate.name)}</h3>{about}")
        places.append(gr.HTML())
    return places


def _told(run: Any, playground: Playground, sampler: Sequence[float]) -> list[Shown]:
    """What a handler computes, with settings that make no sampler told to the visitor."""
    try:
        return run(_sampler(playground, *sampler))
    except VarkdError as error:
        raise gr.Error(str(error)) from error


def _html(shown: Shown) -> str:
    """What a model made, as a grid that takes as many columns as fit."""
    if shown.images_NHWC is None:
        return f"<p>Not drawn: {escape(shown.refusal or '')}</p>"
    num = len(shown.images_NHWC)
    told = f"{num} images in {shown.seconds:.2f} s, {num / shown.seconds:.1f} a second"
    return f"{_grid(shown.images_NHWC)}<p>{told}</p>"


def _grid(images_NHWC: NDArray[np.uint8], captions: Sequence[str] = ()) -> str:
    cells = []
    for index, image_HWC in enumerate(images_NHWC):
        file = io.BytesIO()
        Image.fromarray(_rgb(image_HWC)).save(file, format="PNG")
        data = base64.b64encode(file.getvalue()).decode()
        caption = f"<figcaption>{escape(captions[index])}</figcaption>" if captions else ""
        cells.append(f'<figure><img alt="image {index + 1}" src="data:image/png;base64,{data}">{caption}</figure>')
    return f'<div class="images">{"".join(cells)}</div>'


def _rgb(image_HWC: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return image_HWC.repeat(3, axis=2) if image_HWC.shape[2] == 1 else image_HWC


def _count(number: int) -> str:
    return f"{number / 1e6:.1f}M" if number >= 1e6 else f"{number / 1e3:.0f}k"
