"""The commands sign and hub: a bundle that sites run because someone they trust signed it."""

import hashlib
from pathlib import Path
from typing import Annotated

import typer

from fedseg.errors import ConfigError

__all__ = ["hub", "sign"]

Bundle = Annotated[Path, typer.Argument(help="An app bundle, as flwr build writes it.")]


def sign(
    bundle: Bundle,
    key: Annotated[Path, typer.Option("--key", help="Private key of ssh-keygen -t ed25519.")],
    signer: Annotated[str, typer.Option("--signer", help="Name under which sites trust the key.")],
) -> None:
    """Sign an app bundle that you have read; writes BUNDLE.signatures.json."""
    from fedseg.federation.signed_bundle import read_signing_key, sign_bundle, trusted_line

    private = read_signing_key(key)
    written = sign_bundle(bundle, private, signer=signer)
    print(f"SHA-256 {hashlib.sha256(bundle.read_bytes()).hexdigest()}")
    print(f"Written: {written}")
    print(f"Sites that trust {signer} have this line in their file of --trusted-entities:")
    print(trusted_line(private, signer))


def hub(
    bundle: Bundle,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port on 127.0.0.1.")] = 8085,
) -> None:
    """Hand a signed bundle to the SuperLink on this machine; runs until Ctrl-C."""
    from fedseg.federation.signed_bundle import app_spec, bundle_server

    try:
        server = bundle_server(bundle, port=port)
    except OSError as error:
        if error.filename is not None:  # a file's
            raise
        raise ConfigError(
            f"--port: got {port}, can't be opened ({error.strerror}); give a free one"
        ) from None
    with server:
        name, version = app_spec(bundle)
        print(f"FLWR_SUPERGRID_API_URL=http://127.0.0.1:{port} flower-superlink ...")
        print(f"flwr run {name}=={version} SUPERLINK --stream", flush=True)
        server.serve_forever()
