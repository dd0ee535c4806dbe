# Two images from one file:
#   docker build -t effdet .                      the static binary and nothing else
#   docker build -t effdet:mpi --target mpi .     with Open MPI, for several ranks
# Run with data and results mounted: docker run -v $PWD/coco:/workspace/coco -v $PWD/runs:/runs effdet train --data /workspace/coco

FROM rust:1-bookworm AS source
WORKDIR /src
COPY . .

FROM source AS build-static
RUN rustup target add "$(uname -m)-unknown-linux-musl" \
 && cargo build --release --locked -p effdet --target "$(uname -m)-unknown-linux-musl" \
 && cp "target/$(uname -m)-unknown-linux-musl/release/effdet" /effdet

FROM source AS build-mpi
RUN apt-get update \
 && apt-get install -y --no-install-recommends libopenmpi-dev libclang-dev clang \
 && cargo build --release --locked -p effdet --features mpi \
 && cp target/release/effdet /effdet

FROM debian:bookworm-slim AS mpi
RUN apt-get update \
 && apt-get install -y --no-install-recommends openmpi-bin openssh-server \
 && rm -rf /var/lib/apt/lists/* \
 && mkdir -p /run/sshd \
 # Containers make their host keys when they start; workers are reached by name without asking.
 && printf 'Host *\n  StrictHostKeyChecking no\n' >> /etc/ssh/ssh_config \
 && sed -i 's/#StrictModes yes/StrictModes no/' /etc/ssh/sshd_config
COPY --from=build-mpi /effdet /usr/local/bin/effdet
ENV OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
WORKDIR /runs
ENTRYPOINT ["effdet"]

FROM scratch AS static
COPY --from=build-static /effdet /effdet
WORKDIR /runs
ENTRYPOINT ["/effdet"]
