"""nvJPEG, and what it means if a call of it fails: an image's fault, or the card's.

Knows nothing of which images are asked for.

A call that fails does not say why: a damaged image may be the reason, the library, or a card that
is lost to this process, where no call will succeed any more. So the card and the library are tried
with an image that is whole. If they do it, one of those asked for is at fault, and whoever asks
finds it as it finds one that nvJPEG takes for none.
"""

import io

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from engine.decoding.nvjpeg import CallFailedError, NvJpeg
from engine.errors import DeviceError, DeviceLostError

# Pixels of the image that is whole.
WHOLE_SIDE = 16


class CheckedNvJpeg:
    """An nvJPEG on a card, with a stream of its own. One batch at a time, within `typed_errors`."""

    def __init__(self, device: torch.device) -> None:
        """Load the library; DeviceError as of `NvJpeg`."""
        self._device = device
        self._nvjpeg = NvJpeg()
        self.stream = torch.cuda.Stream(device)

    def decode(
        self,
        sources: NDArray[np.int64],
        *,
        num_bytes: NDArray[np.int64],
        targets: NDArray[np.int64],
        row_bytes: NDArray[np.int64],
    ) -> bool:
        """Decode a batch to its end; arguments and result as of `NvJpeg.decode`.

        Also False, and nothing was decoded, if it failed and an image is the reason.

        Raises:
            DeviceLostError: The card fails, or nvJPEG does so whatever the image.
            DeviceMemoryError: The card has too little free memory.
        """
        try:
            return self._nvjpeg.decode(
                sources,
                num_bytes=num_bytes,
                targets=targets,
                row_bytes=row_bytes,
                stream=self.stream.cuda_stream,
            )
        except CallFailedError as error:
            fault = error
        finally:
            # Also of a call that failed, what had begun still reads and writes. Of a card that is
            # lost this fails as well.
            self.stream.synchronize()
        self._recover(fault)
        return False

    def close(self) -> None:
        """Free its memory, here and on the card."""
        self._nvjpeg.close()

    def _recover(self, fault: CallFailedError) -> None:
        """Have another nvJPEG, which decodes; DeviceLostError if it does not, or the card fails."""
        torch.ones(1, device=self._device).item()  # raises where the card is lost
        self._nvjpeg.close()  # first: there may not be room for both
        try:
            self._nvjpeg = NvJpeg()
        except DeviceError as error:
            raise DeviceLostError(f"it cannot be started again ({error}), after {fault}") from error
        if not self._decodes_whole():
            raise DeviceLostError(f"it fails at an image that is whole, too: {fault}")

    def _decodes_whole(self) -> bool:
        source = np.frombuffer(whole_jpeg(), dtype=np.uint8)
        target = torch.empty(3 * WHOLE_SIDE**2, dtype=torch.uint8, device=self._device)
        try:
            return self._nvjpeg.decode(
                np.array([source.ctypes.data]),
                num_bytes=np.array([len(source)]),
                targets=np.array([target.data_ptr()]),
                row_bytes=np.array([3 * WHOLE_SIDE]),
                stream=self.stream.cuda_stream,
            )
        except CallFailedError:
            return False
        finally:
            self.stream.synchronize()


def whole_jpeg() -> bytes:
    """A JPEG that every nvJPEG decodes, of WHOLE_SIDE x WHOLE_SIDE pixels."""
    encoded = io.BytesIO()
    Image.new("RGB", (WHOLE_SIDE, WHOLE_SIDE)).save(encoded, "JPEG")
    return encoded.getvalue()
