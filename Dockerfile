# The server, with its page, on the CPU or on a GPU:
#
#   docker build -t fastlm .
#   docker run --rm -p 127.0.0.1:8000:8000 fastlm
#
#   docker build -t fastlm:gpu --build-arg DEVICE=gpu .
#   docker run --rm --gpus all -p 127.0.0.1:8000:8000 -v ./models:/models fastlm:gpu --device cuda --model /models/mine
ARG DEVICE=cpu

FROM python:3.11-slim-bookworm AS build
ARG DEVICE
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
RUN python -m venv /venv
ENV PATH=/venv/bin:$PATH
WORKDIR /src
# torch changes seldom and is large: a layer of its own. The wheel for CUDA brings its libraries.
COPY constraints.txt .
RUN if [ "$DEVICE" = cpu ]; \
    then pip install --no-cache-dir -c constraints.txt torch --index-url https://download.pytorch.org/whl/cpu; \
    else pip install --no-cache-dir -c constraints.txt torch; fi
COPY . .
RUN if [ "$DEVICE" = cpu ]; then extras=serve,gemma; else extras=serve,gemma,gpu; fi; \
    pip install --no-cache-dir -c constraints.txt ".[$extras]"

FROM python:3.11-slim-bookworm
# Triton compiles the small launcher of each kernel with a C compiler when a kernel is first used.
ARG DEVICE
RUN if [ "$DEVICE" != cpu ]; \
    then apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*; fi
RUN useradd --create-home fastlm
COPY --from=build /venv /venv
ENV PATH=/venv/bin:$PATH PYTHONUNBUFFERED=1
USER fastlm
WORKDIR /home/fastlm
EXPOSE 8000
HEALTHCHECK --start-period=60s CMD \
    python -c "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/ready', timeout=3)"
# FASTLM_API_KEY, if it is set, is what clients must give. SIGTERM lets what has begun end.
ENTRYPOINT ["fastlm", "serve", "--host", "0.0.0.0", "--port", "8000"]
