import torch
from torchvision.ops import box_convert, box_iou

from utils.boxes import cxcywh_to_xyxy, pairwise_iou, xyxy_to_cxcywh


def random_boxes(count, seed):
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=generator) * 50
    return torch.cat((corner, corner + torch.rand(count, 2, generator=generator) * 30), dim=1)


def test_conversions_are_torchvisions_and_each_others_inverse():
    boxes = random_boxes(20, 0)
    torch.testing.assert_close(xyxy_to_cxcywh(boxes), box_convert(boxes, "xyxy", "cxcywh"))
    torch.testing.assert_close(cxcywh_to_xyxy(xyxy_to_cxcywh(boxes)), boxes)


def test_pairwise_iou_is_torchvisions():
    first, second = random_boxes(20, 1), random_boxes(30, 2)
    torch.testing.assert_close(pairwise_iou(first, second), box_iou(first, second))


def test_empty_sets_and_boxes_without_area_give_zero_not_nan():
    point = torch.tensor([[5.0, 5.0, 5.0, 5.0]])
    assert pairwise_iou(point, point).item() == 0
    assert pairwise_iou(point, torch.zeros(0, 4)).shape == (1, 0)
    assert cxcywh_to_xyxy(torch.zeros(0, 4)).shape == (0, 4)
