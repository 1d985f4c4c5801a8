# Training, with or without a GPU (--gpus all needs the NVIDIA container toolkit; CUDA itself comes with torch):
#   docker build -t prgkit .
#   docker run --rm --gpus all --user "$(id -u):$(id -g)" --shm-size 8g -v "$PWD:/home/prgkit" prgkit distill demo export bench
# Runs, targets and bundles are written into the folder that is mounted.
FROM python:3.11-slim
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY toolkit toolkit
COPY export export
COPY evaluate evaluate
COPY recipes recipes
RUN pip install --no-cache-dir '.[distill,rtx,hub,remote]'
# What is downloaded, such as a teacher's weights, is kept beside the runs.
ENV HOME=/tmp HF_HOME=/home/prgkit/.cache/huggingface
WORKDIR /home/prgkit
ENTRYPOINT ["prgkit"]
CMD ["--help"]
