"""timm's models at small image sizes: one of each architecture, random weights."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import tiny_torchvision  # noqa: F401  (timm imports torchvision, which needs what is done there)

# isort: split
import timm
import torch
from torch import nn

from spacompiler.models_zoo._seeded import images, randomise_all, seeded

Built = tuple[nn.Module, tuple[torch.Tensor, ...]]

# Architectures that take any image size ...
FREE = """
convformer_s18 convnext_atto convnextv2_atto cs3darknet_s cspresnet50 darknet53 densenet121 dla34
dm_nfnet_f0 dpn48b eca_nfnet_l0 ecaresnet26t edgenext_xx_small efficientnet_b0 efficientnet_es
efficientvit_b0 fastvit_t8 fbnetc_100 gernet_s ghostnet_050 ghostnetv2_100 hardcorenas_a
hgnet_tiny hgnetv2_b0 hrnet_w18_small inception_next_atto lambda_resnet26t lcnet_035
mambaout_femto mixnet_s mnasnet_small mobilenetv1_100 mobilenetv2_035 mobilenetv3_small_050
mobilenetv4_conv_small mobileone_s0 mobilevit_xxs mobilevitv2_050 nextvit_small nf_regnet_b0
poolformer_s12 poolformerv2_s12 pvt_v2_b0 regnetx_002 regnety_002 regnetz_b16 repghostnet_050
repvgg_a0 repvit_m0_9 res2net50_14w_8s resnest14d resnet10t resnet18 resnet26d resnetaa34d
resnetv2_18 resnext26ts rexnet_100 selecsls42 semnasnet_050 seresnet18 skresnet18 spnasnet_100
starnet_s050 swiftformer_xs tf_efficientnet_lite0 tf_mixnet_s tiny_vit_5m_224 tinynet_e tresnet_m
twins_pcpvt_small vgg11_bn vovnet39a xception41 xcit_nano_12_p16_224
""".split()
# ... and those that are made for one.
FIXED = """
bat_resnext26ts beit_base_patch16_224 botnet26t_256 cait_xxs24_224 coat_lite_tiny
coatnet_pico_rw_224 convit_tiny convmixer_768_32 crossvit_tiny_240 davit_tiny
deit_tiny_patch16_224 deit3_small_patch16_224 efficientformer_l1 efficientformerv2_s0
eva02_tiny_patch14_224 flexivit_small focalnet_tiny_srf gcvit_xxtiny gmixer_12_224 gmlp_ti16_224
halonet26t hiera_tiny_224 inception_resnet_v2 inception_v4 levit_128s maxvit_pico_rw_256
mixer_s32_224 mvitv2_tiny nest_tiny_jx pit_ti_224 resmlp_12_224 samvit_base_patch16_224
sequencer2d_s swin_tiny_patch4_window7_224 swinv2_cr_tiny_224 tnt_s_legacy_patch16_224
visformer_tiny vit_tiny_patch16_224 vit_relpos_small_patch16_224 vit_srelpos_small_patch16_224
vitamin_small_224 volo_d1_224
""".split()


def _build(name: str, size: int | None) -> Built:
    with seeded(0):
        module = timm.create_model(name, pretrained=False, num_classes=10)
        side = size or module.default_cfg["input_size"][-1]
        return randomise_all(module), (images(size=side // 8 * 8),)


MODELS: dict[str, Callable[[], Built]] = {
    **{name: partial(_build, name, 64) for name in FREE},
    **{name: partial(_build, name, None) for name in FIXED},
}
