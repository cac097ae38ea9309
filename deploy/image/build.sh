#!/bin/sh
# build.sh [NAME] [ARGUMENT...]: lay out the context in build/image and build the image; the arguments are for the builder.
# IMAGE_ARCHES="amd64 arm64" builds for these and makes NAME a manifest list of both.
set -eu
cd "$(dirname "$0")/../.."

for builder in buildah podman docker ""; do
    [ -n "$builder" ] || { echo "An image is built by buildah, podman or docker: install one of them." >&2; exit 1; }
    command -v "$builder" >/dev/null && break
done
version=$(.venv/bin/python -c 'from clusterproxy import __version__; print(__version__)')
revision=$(git rev-parse HEAD 2>/dev/null || true)
# The tag that the chart takes by default.
name=${1:-cluster-proxy:v$(sed -n 's/^version: //p' deploy/charts/cluster-proxy/Chart.yaml)}
[ $# = 0 ] || shift

context=build/image
kubernetes=tests/kube/apiserver
rm -rf "$context"
mkdir -p "$context"
cp -r requirements/runtime.txt requirements/image-tools.txt deploy/image/left-out.txt deploy/image/paths deploy/image/trim.py "$context"
.venv/bin/python -m pip wheel -q --disable-pip-version-check --no-deps --no-build-isolation -w "$context" .
release=$(sed -n 's|^\tk8s.io/kubernetes ||p' "$kubernetes/go.mod")
flags="-s -w -X k8s.io/component-base/version.gitVersion=$release"
arches=${IMAGE_ARCHES:-$(go env GOARCH)}
for arch in $arches; do
    echo "Building kubectl $release for $arch ..."
    (cd "$kubernetes" && CGO_ENABLED=0 GOOS=linux GOARCH=$arch go build -trimpath -ldflags "$flags" \
        -o "../../../$context/kubectl-$arch" k8s.io/kubernetes/cmd/kubectl)
done

as=-t
case $arches in
*\ *)
    [ "$builder" != docker ] || { echo "For several platforms use docker buildx with $context as its context." >&2; exit 1; }
    as=--manifest
    ;;
esac
for arch in $arches; do
    "$builder" build -f deploy/image/Containerfile --platform "linux/$arch" --build-arg "VERSION=$version" \
        --build-arg "REVISION=$revision" "$as" "$name" "$@" "$context"
done
