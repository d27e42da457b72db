"""Write the same cases in every layout, for the tests of layouts and of DICOM."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

AFFINE = np.array([[-1.5, 0, 0, 40], [0, -2.0, 0, 30], [0, 0, 3.0, -12], [0, 0, 0, 1]])
"""Of DICOM and ITK for an axial scan: columns to the left, rows to the back, slices to the head."""

SHAPE = (18, 17, 16)


def arrays(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A CT-like image int16 `[column, row, slice]` and its labels 0, 1, 2."""
    rng = np.random.default_rng(seed)
    image = np.full(SHAPE, -1000, np.int16)
    image[1:-1, 1:-1, 1:-1] = rng.integers(20, 100, tuple(n - 2 for n in SHAPE))
    labels = np.zeros(SHAPE, np.uint8)
    labels[4:12, 3:12, 4:13] = 1
    labels[5 : 8 + seed % 2, 5:8, 5:8] = 2
    return image, labels


def nifti(path: Path, array: np.ndarray, affine: np.ndarray = AFFINE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, affine), path)
    return path


def series(
    folder: Path,
    image: np.ndarray,
    *,
    affine: np.ndarray = AFFINE,
    change: Callable[[Any, int], None] = lambda data, slice_: None,
    modality: str = "CT",
    prefix: str = "",
    order: Sequence[int] | None = None,
) -> list[Any]:
    """Write `[column, row, slice]` on a RAS affine as a series; `change(dataset, slice)` spoils."""
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, MRImageStorage, generate_uid

    folder.mkdir(parents=True, exist_ok=True)
    lps = np.diag([-1.0, -1, 1, 1]) @ affine
    sizes = np.linalg.norm(lps[:3, :3], axis=0)
    study, uid, frame = generate_uid(), generate_uid(), generate_uid()
    written = []
    for place, k in enumerate(range(image.shape[2]) if order is None else order):
        meta = FileMetaDataset()
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        meta.MediaStorageSOPClassUID = CTImageStorage if modality == "CT" else MRImageStorage
        meta.MediaStorageSOPInstanceUID = generate_uid()
        data = FileDataset(None, {}, file_meta=meta, preamble=bytes(128))
        data.SOPClassUID = meta.MediaStorageSOPClassUID
        data.SOPInstanceUID = meta.MediaStorageSOPInstanceUID
        data.StudyInstanceUID, data.SeriesInstanceUID, data.FrameOfReferenceUID = study, uid, frame
        data.Modality, data.ImageType = modality, ["ORIGINAL", "PRIMARY", "AXIAL"]
        data.PatientName, data.PatientID, data.PatientSex = "Muster^Erika", "0815", "F"
        data.PatientBirthDate, data.StudyDate, data.StudyTime = "19700101", "20200101", "120000"
        data.AccessionNumber, data.ReferringPhysicianName, data.StudyID = "", "", "1"
        data.SeriesNumber, data.InstanceNumber = 1, place + 1
        data.PositionReferenceIndicator = ""
        data.ImagePositionPatient = [float(v) for v in (lps @ [0, 0, k, 1])[:3].round(6)]
        turn = np.concatenate([lps[:3, 0] / sizes[0], lps[:3, 1] / sizes[1]])
        data.ImageOrientationPatient = [float(v) for v in turn.round(6)]
        data.PixelSpacing = [float(sizes[1]), float(sizes[0])]
        data.SliceThickness = float(sizes[2])
        data.Rows, data.Columns = image.shape[1], image.shape[0]
        data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
        data.BitsAllocated, data.BitsStored, data.HighBit = 16, 16, 15
        data.PixelRepresentation = 0
        data.RescaleSlope, data.RescaleIntercept = 1, -1024
        stored = (image[:, :, k].astype(np.int32) + 1024).astype(np.uint16)
        data.PixelData = np.ascontiguousarray(stored.T).tobytes()
        change(data, k)
        data.save_as(folder / f"{prefix}{place:03}.dcm", enforce_file_format=True)
        written.append(data)
    return written


def segmentation(
    path: Path,
    sources: Sequence[Any],
    segments: dict[str, np.ndarray],
    *,
    kind: str = "BINARY",
    omit_empty: bool = True,
) -> Path:
    """Write segments `[column, row, slice]` by name as DICOM-SEG of a series."""
    import highdicom as hd
    from pydicom.sr.codedict import codes

    path.parent.mkdir(parents=True, exist_ok=True)
    descriptions = [
        hd.seg.SegmentDescription(
            segment_number=number,
            segment_label=name,
            segmented_property_category=codes.SCT.Organ,
            segmented_property_type=codes.SCT.Liver,
            algorithm_type=hd.seg.SegmentAlgorithmTypeValues.MANUAL,
        )
        for number, name in enumerate(segments, 1)
    ]
    ordered = sorted(sources, key=lambda data: data.InstanceNumber)
    stacked = np.stack([part.transpose(2, 1, 0) for part in segments.values()], axis=-1)
    if kind == "LABELMAP":
        number = np.arange(1, len(segments) + 1, dtype=np.uint8)
        pixels = (stacked.astype(np.uint8) * number).max(axis=-1)
    else:
        pixels = stacked.astype(np.float32 if kind == "FRACTIONAL" else np.uint8)
    hd.seg.Segmentation(
        source_images=ordered,
        pixel_array=pixels,
        segmentation_type=kind,
        segment_descriptions=descriptions,
        series_instance_uid=hd.UID(),
        series_number=2,
        sop_instance_uid=hd.UID(),
        instance_number=1,
        manufacturer="fedseg",
        manufacturer_model_name="test",
        software_versions="1",
        device_serial_number="1",
        omit_empty_frames=omit_empty,
    ).save_as(path)
    return path


def _images_masks(root: Path, seeds: Sequence[int]) -> None:
    for seed in seeds:
        image, labels = arrays(seed)
        nifti(root / "images" / f"p{seed}_img.nii.gz", image)
        nifti(root / "masks" / f"p{seed}_seg.nii", labels)


def _lits(root: Path, seeds: Sequence[int]) -> None:
    for seed in seeds:
        image, labels = arrays(seed)
        nifti(root / f"Training Batch {1 + seed % 2}" / f"volume-{seed}.nii", image)
        nifti(root / "segmentations" / f"segmentation-{seed}.nii", labels)


def _dataset_json(root: Path, **content: object) -> None:
    (root / "dataset.json").write_text(json.dumps(content))


def _msd(root: Path, seeds: Sequence[int]) -> None:
    for seed in seeds:
        image, labels = arrays(seed)
        nifti(root / "imagesTr" / f"liver_{seed}.nii.gz", image)
        nifti(root / "imagesTs" / f"liver_{100 + seed}.nii.gz", image)
        nifti(root / "labelsTr" / f"liver_{seed}.nii.gz", np.array([0, 2, 1], np.uint8)[labels])
        (root / "imagesTr" / f"._liver_{seed}.nii.gz").touch()
    labels_of = {"0": "background", "1": "Cancer", "2": "liver"}
    _dataset_json(root, name="Liver", modality={"0": "CT"}, labels=labels_of)


def _nnunet(root: Path, seeds: Sequence[int]) -> None:
    for seed in seeds:
        image, labels = arrays(seed)
        nifti(root / "imagesTr" / f"case_{seed}_0000.nii.gz", image)
        nifti(root / "labelsTr" / f"case_{seed}.nii.gz", labels * 3)
    _dataset_json(
        root,
        channel_names={"0": "CT"},
        labels={"background": 0, "liver": 3, "liver tumour": 6},
        file_ending=".nii.gz",
        numTraining=len(seeds),
    )


def _bids(root: Path, seeds: Sequence[int]) -> None:
    for seed in seeds:
        image, labels = arrays(seed)
        where, name = f"sub-{seed}/ses-1", f"sub-{seed}_ses-1"
        nifti(root / where / "ct" / f"{name}_ct.nii.gz", image)
        out = root / "derivatives" / "manual" / where / "anat"
        nifti(out / f"{name}_space-orig_desc-liver_dseg.nii.gz", labels)


def _dicom(root: Path, seeds: Sequence[int]) -> None:
    for seed in seeds:
        image, labels = arrays(seed)
        data = series(root / f"p{seed}" / "ct", image)
        if seed % 2:
            nifti(root / "masks" / f"p{seed}.nii.gz", labels)
        else:
            parts = {"Liver": labels >= 1, "Lesion": labels == 2}
            segmentation(root / f"p{seed}" / "seg.dcm", data, parts)


WRITERS: dict[str, Callable[[Path, Sequence[int]], None]] = {
    "images-masks": _images_masks,
    "lits": _lits,
    "msd": _msd,
    "nnunet": _nnunet,
    "bids": _bids,
    "dicom": _dicom,
}
