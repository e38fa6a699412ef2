# gguf3n with its quantizers compiled: docker build -t gguf3n . && docker run --rm -v "$PWD:/work" gguf3n convert …
FROM python:3.12-slim AS build
WORKDIR /source
COPY pyproject.toml README.md LICENSE constraints.txt ./
COPY gguf3n gguf3n
RUN python -m venv /opt/gguf3n \
 && /opt/gguf3n/bin/pip install --no-cache-dir --disable-pip-version-check --constraint constraints.txt .

FROM python:3.12-slim
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="gguf3n" \
      org.opencontainers.image.description="Gemma 3n to GGUF files for llama.cpp, Ollama and LM Studio" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="$VERSION" \
      org.opencontainers.image.revision="$REVISION"
RUN useradd --create-home --uid 1000 gguf3n && mkdir /work && chown gguf3n /work
COPY --from=build /opt/gguf3n /opt/gguf3n
COPY scripts/compile_quantizers.py /opt/gguf3n/compile_quantizers.py
ENV PATH=/opt/gguf3n/bin:$PATH \
    NUMBA_CACHE_DIR=/home/gguf3n/.cache/numba \
    PYTHONDONTWRITEBYTECODE=1
USER gguf3n
RUN python /opt/gguf3n/compile_quantizers.py
WORKDIR /work
ENTRYPOINT ["gguf3n"]
CMD ["--help"]
