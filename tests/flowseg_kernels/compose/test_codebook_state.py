"""After any change of a codebook's tensors, decoding uses the new codes, or an error names the cause."""

import copy
import io
import pickle

import pytest
import torch
import torch.distributed as dist
from torch.func import functional_call, stack_module_state, vmap
from torch.optim.swa_utils import AveragedModel

import flowseg_kernels as fk
from flowseg_kernels.derived import smallest_distance

from .ranks import needs_gloo, run_two

CODES = fk.kronecker_centroids(40)
OTHER = fk.kronecker_centroids(40, sequence="r_sequence")
NAN = torch.full((1, 3, 1, 1), torch.nan)


def points():
    return torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(1)) * 2.4 - 1.2


def make(codes=CODES, ignore=-1):
    """A network with a loss and a decoder that share a codebook."""
    book = fk.Codebook(codes, ignore_index=ignore)
    model = torch.nn.Module()
    model.net = torch.nn.Conv2d(3, 3, 1)
    model.loss, model.decode = fk.FlowLoss(book), fk.CentroidDecoder(book)
    return model


def check(model, codes, ignore=-1):
    """Check that the model decodes, counts and computes losses like a model made with these codes."""
    book = model.decode.codebook
    x = points()
    with fk.use_backend("reference"):
        want = fk.nearest_centroid(x, codes)
    assert torch.equal(model.decode(x), want)
    assert model.decode(NAN).item() == ignore
    target = want.clone()
    target[0, :4] = ignore
    # Every pixel decodes to its target.
    assert torch.equal(
        fk.decode_confusion(x, target, book), torch.diag(torch.bincount(target[target != ignore], minlength=40))
    )
    eps = 0.2 * smallest_distance(codes) ** 2
    assert (book.default_eps, book.ignore_index, book.num_classes) == (eps, ignore, 40)
    t = torch.tensor([0.3, 0.8])
    loss = fk.flow_loss(x * 0.7, x.flip(3), target, t, codes, eps=eps, ignore_index=ignore)
    assert torch.equal(model.loss(x * 0.7, x.flip(3), target, t), loss)


def each_buffer(model, write):
    for buffer in model.loss.codebook.buffers():
        write(buffer)


def loaded_in_place(model, tmp_path):
    for name, value in model.state_dict().items():
        value.copy_(make(OTHER, -7).state_dict()[name])


def loaded_by_checkpoint(model, tmp_path):
    import torch.distributed.checkpoint as dcp

    with pytest.warns(UserWarning, match="single process"):
        dcp.save({"model": make(OTHER, -7).state_dict()}, checkpoint_id=tmp_path)
        dcp.load({"model": model.state_dict()}, checkpoint_id=tmp_path)


def loaded_from_a_file(model, tmp_path):
    from safetensors.torch import load_file, save_file

    save_file(make(OTHER, -7).state_dict(), tmp_path / "model.safetensors")
    model.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert model.loss.codebook is model.decode.codebook


def assigned(model, tmp_path):
    model.load_state_dict(make(OTHER, -7).state_dict(), assign=True)


def loaded_after_meta(model, tmp_path):
    model.to("meta").to_empty(device="cpu").load_state_dict(make(OTHER, -7).state_dict())


def written(write):
    """A change that writes the other codes and the other label into the buffers with `write`."""

    def change(model, tmp_path):
        book = model.decode.codebook
        write(book.centroids, OTHER)
        write(book.ignored, torch.tensor(-7))

    return change


def replaced(model, tmp_path):
    model.decode.codebook.centroids, model.decode.codebook.ignored = OTHER.clone(), torch.tensor(-7)


def replaced_by_wider_dtypes(model, tmp_path):
    model.decode.codebook.centroids = OTHER.double()
    model.decode.codebook.ignored = torch.tensor(-7.0)


#: Changes after which the model has the other codes and the other label.
CHANGES = {
    "state_dict in place": loaded_in_place,
    "distributed checkpoint": loaded_by_checkpoint,
    "safetensors": loaded_from_a_file,
    "assign": assigned,
    "meta, to_empty, load": loaded_after_meta,
    "copy_": written(lambda buffer, value: buffer.copy_(value)),
    ".data": written(lambda buffer, value: buffer.data.copy_(value)),
    "numpy": written(lambda buffer, value: buffer.numpy().__setitem__(..., value.numpy())),
    "set_data": written(lambda buffer, value: setattr(buffer, "data", value.clone())),
    "setattr": replaced,
    "setattr, wider": replaced_by_wider_dtypes,
}


@pytest.mark.parametrize("change", CHANGES)
def test_decoding_uses_new_codes_after_each_kind_of_change(change, tmp_path):
    model = make()
    check(model, CODES)
    CHANGES[change](model, tmp_path)
    check(model, OTHER, -7)


def averaged(model, tmp_path):
    mean = AveragedModel(model, use_buffers=True)
    for _ in range(3):
        mean.update_parameters(model)
    return mean.module


def moving_average(model, tmp_path):
    """Average every floating tensor of the state, as callbacks of training frameworks do."""
    mean = copy.deepcopy(model)
    for own, new in zip(mean.state_dict().values(), model.state_dict().values()):
        if own.is_floating_point():
            own.lerp_(new, 0.25)
    return mean


def moved_through_meta(model, tmp_path):
    return model.to("meta").to_empty(device="cpu")


def saved_as_a_module(model, tmp_path):
    torch.save(model, tmp_path / "model.pt")
    return torch.load(tmp_path / "model.pt", weights_only=False)


def through_transformers(dtype):
    def keep(model, tmp_path):
        from transformers import PretrainedConfig, PreTrainedModel

        class Model(PreTrainedModel):
            config_class = PretrainedConfig

            def __init__(self, config):
                super().__init__(config)
                self.inner = make()
                self.post_init()

        given = Model(PretrainedConfig())
        given.inner.load_state_dict(model.state_dict())
        given.save_pretrained(tmp_path)
        return Model.from_pretrained(tmp_path, dtype=dtype).inner

    return keep


def offloaded(how):
    def keep(model, tmp_path):
        import accelerate

        decoder = torch.nn.Sequential(model.decode)
        if how == "cpu":
            accelerate.cpu_offload(decoder, execution_device=torch.device("cpu"), offload_buffers=True)
        elif how == "disk":
            accelerate.disk_offload(decoder, tmp_path, execution_device=torch.device("cpu"), offload_buffers=True)
        else:
            accelerate.dispatch_model(decoder, {"": "cpu"}, main_device="cpu", offload_buffers=True, force_hooks=True)
        # Outside of a call the tensors are offloaded.
        assert how == "dispatch" or model.decode.codebook.centroids.is_meta
        return decoder

    return keep


def cast(**how):
    return lambda model, tmp_path: model.to(**how)


#: Operations after which the model still has its codes.
KEEPERS = {
    "AveragedModel": averaged,
    "moving average": moving_average,
    "deepcopy": lambda model, tmp_path: copy.deepcopy(model),
    "pickle": lambda model, tmp_path: pickle.loads(pickle.dumps(model)),
    "torch.save": saved_as_a_module,
    "share_memory": lambda model, tmp_path: model.share_memory(),
    "half": lambda model, tmp_path: model.half(),
    "bfloat16": lambda model, tmp_path: model.bfloat16(),
    "double": lambda model, tmp_path: model.double(),
    "to bfloat16": cast(dtype=torch.bfloat16),
    "type float32": lambda model, tmp_path: model.type(torch.float32),
    "type bfloat16": lambda model, tmp_path: model.type(torch.bfloat16),
    "type int64": lambda model, tmp_path: model.decode.codebook.type(torch.int64) and model,
    "to_empty": lambda model, tmp_path: model.to_empty(device="cpu"),
    "meta, to_empty": moved_through_meta,
    "from_pretrained": through_transformers(torch.float32),
    "from_pretrained bfloat16": through_transformers(torch.bfloat16),
}


@pytest.mark.parametrize("operation", KEEPERS)
@pytest.mark.parametrize("codes", [CODES, OTHER], ids=["made", "loaded"])
def test_moving_copying_casting_and_averaging_keep_the_codes(operation, codes, tmp_path):
    if codes is OTHER and operation == "from_pretrained bfloat16":
        pytest.skip("from_pretrained casts the file's codes while it reads them, and the new model has other codes")
    model = make()
    if codes is OTHER:
        model.load_state_dict(make(OTHER).state_dict())
    check(KEEPERS[operation](model, tmp_path), codes)


@pytest.mark.parametrize("how", ["cpu", "disk", "dispatch"])
def test_decoding_with_offloaded_tensors(how, tmp_path):
    model = make()
    model.load_state_dict(make(OTHER).state_dict())
    decoder = offloaded(how)(model, tmp_path)
    want = fk.nearest_centroid(points(), OTHER)
    for _ in range(2):
        assert torch.equal(decoder(points()), want) and decoder(NAN).item() == -1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_cast_that_bypasses_the_module_keeps_the_codes(dtype):
    """FSDP1 casts buffers by their .data."""
    model = make()
    model.load_state_dict(make(OTHER).state_dict())
    book = model.decode.codebook
    book.centroids.data = book.centroids.data.to(dtype)
    check(model, OTHER)
    saved = {k: v.to(dtype) if v.is_floating_point() else v for k, v in make(OTHER).state_dict().items()}
    model.load_state_dict(saved)
    check(model, OTHER)


def ema_of_everything(decay):
    """AveragedModel with a decay, which also averages integers and truncates them."""

    def average(model, tmp_path):
        from torch.optim.swa_utils import get_ema_multi_avg_fn

        mean = AveragedModel(model, use_buffers=True, multi_avg_fn=get_ema_multi_avg_fn(decay))
        for _ in range(30):
            mean.update_parameters(model)
        return mean.module

    return average


@pytest.mark.parametrize("decay", [0.5, 0.9, 0.95, 0.999, 0.9999])
@pytest.mark.parametrize("label", [254, -7, 21, 1000, 65535])
def test_averages_keep_the_ignored_label(decay, label):
    mean = ema_of_everything(decay)(make(ignore=label), None)
    check(mean, mean.decode.codebook.centroids, label)
    assert torch.equal(mean.decode.codebook.centroids, CODES)


def test_codes_that_change_at_each_step_decode_right_with_and_without_a_grid():
    book = make().decode.codebook
    for _ in range(3):
        book.centroids.data.mul_(0.99)
        for _ in range(5):
            assert torch.equal(book.decode(points()), fk.nearest_centroid(points(), book.centroids))


GARBAGE = {
    "NaN": lambda b: b.fill_(torch.nan) if b.is_floating_point() else b.fill_(3),
    "infinity": lambda b: b[0].fill_(torch.inf) if b.ndim else b,
    "integers": lambda b: setattr(b, "data", b.long()) if b.ndim else b,
    "other codes in bfloat16": lambda b: setattr(b, "data", OTHER.bfloat16()) if b.ndim else b,
    "a fraction for the label": lambda b: b if b.ndim else b.fill_(0.5),
    "infinity for the label": lambda b: b if b.ndim else b.fill_(torch.inf),
    "a vector for the label": lambda b: b if b.ndim else setattr(b, "data", torch.tensor([1.0, 2.0])),
    "nothing for the label": lambda b: b if b.ndim else setattr(b, "data", torch.zeros(0)),
    "a complex label": lambda b: b if b.ndim else setattr(b, "data", torch.tensor(1j)),
    "a label beyond bfloat16": lambda b: b if b.ndim else setattr(b, "data", torch.tensor(300.0).bfloat16()),
    "a vector for the codes": lambda b: setattr(b, "data", b.flatten()) if b.ndim else b,
    "no codes": lambda b: setattr(b, "data", b[:0]) if b.ndim else b,
}


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("kind", GARBAGE)
def test_garbage_is_an_error_that_names_the_codebook(kind, backend):
    model = make()
    each_buffer(model, GARBAGE[kind])
    with (
        fk.use_backend(backend),
        pytest.raises((TypeError, ValueError), match=r"^(centroids|codebook|ignored): wanted"),
    ):
        model.decode(points())


@pytest.mark.parametrize("value", [0.0, 1e30, -3.5])
def test_any_finite_codes_are_codes(value, backend):
    """After a fill all codes coincide, and the tie goes to the first."""
    model = make()
    model.decode.codebook.centroids.fill_(value)
    assert not model.decode(points()).any()


def test_tensors_without_values_are_named():
    book = make().decode.codebook
    book.centroids = book.centroids.to("meta")
    with pytest.raises(ValueError, match="codebook: wanted its centroids to hold values; got a meta tensor"):
        book.decode(points())
    for value in (torch.tensor(0.0, device="meta"), None):
        book = make().decode.codebook
        book.ignored = value
        for call in (book.decode, torch.compile(book.decode, backend="eager", fullgraph=True)):
            with pytest.raises(Exception, match="codebook: wanted its ignored label to hold a value"):
                call(points())
    book.centroids = None
    with pytest.raises(TypeError, match="codebook: wanted its centroids to be a dense tensor; got NoneType"):
        book.decode(points())


@pytest.mark.parametrize("label", [2**31 + 5, 2**40, -(2**33), 2**53])
def test_a_label_of_more_than_32_bits(backend, label):
    assert fk.Codebook(CODES, ignore_index=label).decode(NAN).item() == label


def test_a_label_that_no_buffer_holds_is_refused():
    with pytest.raises(ValueError, match=r"ignore_index: wanted at most 2\*\*53 from 0"):
        fk.Codebook(CODES, ignore_index=2**63)


@pytest.mark.parametrize("value", [0.5, torch.nan, 1e300])
def test_a_label_in_a_file_that_is_no_whole_number_is_refused(value):
    model, state = make(), make().state_dict()
    state["decode.codebook.ignored"] = torch.tensor(value, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"ignored: wanted the codebook's ignored label, a whole number"):
        model.load_state_dict(state)
    check(model, CODES)


def test_states_of_an_earlier_version_load():
    """They have the label as int64."""
    state = make(OTHER, -7).state_dict()
    state = {k: v.long() if k.endswith("ignored") else v for k, v in state.items()}
    for assign in (False, True):
        model = make()
        model.load_state_dict(state, assign=assign)
        check(model, OTHER, -7)


def test_a_cast_buffer_is_saved_with_its_exact_codes():
    model = make()
    model.decode.codebook.centroids.data = CODES.bfloat16()
    assert torch.equal(model.state_dict()["decode.codebook.centroids"], CODES)


def test_threads_with_different_codes():
    import concurrent.futures

    def work(seed):
        codes = torch.rand(9, 3, generator=torch.Generator().manual_seed(seed))
        book = fk.Codebook(codes)
        for step in range(12):
            book.centroids.mul_(0.9)
            want = fk.nearest_centroid(points(), book.centroids)
            assert torch.equal(book.decode(points()), want), step

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(12)))


def test_a_pickled_model_loads_to_the_meta_device(tmp_path):
    torch.save(make(), tmp_path / "model.pt")
    model = torch.load(tmp_path / "model.pt", map_location="meta", weights_only=False)
    model.to_empty(device="cpu").load_state_dict(make().state_dict())
    check(model, CODES)


def test_an_invalid_state_is_refused_and_changes_nothing():
    model, state = make(), make().state_dict()
    state["decode.codebook.centroids"] = torch.full((40, 3), torch.nan)
    with pytest.raises(RuntimeError, match=r"decode\.codebook\.centroids: wanted finite values; got NaN"):
        model.load_state_dict(state)
    check(model, CODES)


def test_the_grid_attribute_is_a_copy():
    book = make().decode.codebook
    want = book.decode(points())
    for table in (*book.grid[:3], book._cells, book._records, book._groups):
        table.fill_(10**9)
    assert torch.equal(book.decode(points()), want)
    assert torch.equal(fk.Codebook(CODES).decode(points()), want)


def test_functional_call_and_stacked_states():
    models = [make().decode, make(OTHER, -7).decode]
    x = points()
    for model, ignore in zip(models, (-1, -7)):
        state = dict(model.named_buffers())
        assert torch.equal(functional_call(models[0], state, (x,)), model(x))
        assert functional_call(models[0], state, (NAN,)).item() == ignore
    _, buffers = stack_module_state(models)
    base = copy.deepcopy(models[0]).to("meta")
    both = vmap(lambda state, x: functional_call(base, state, (x,)), in_dims=(0, None))(buffers, x)
    assert torch.equal(both, torch.stack([model(x) for model in models]))


def test_compiled_code_follows_the_codes():
    model = make()
    x, labels, t = points(), torch.randint(0, 40, (2, 16, 24)), torch.tensor([0.2, 0.9])

    def step(x, labels, t):
        return (
            model.loss(x, x.flip(3), labels, t),
            model.decode(x),
            fk.decode_confusion(x, labels, model.decode.codebook),
        )

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for change in ("copy_", ".data", "state_dict in place"):
            for got, want in zip(compiled(x, labels, t), step(x, labels, t)):
                torch.testing.assert_close(got, want, rtol=1e-6, atol=0)
            CHANGES[change](model, None)
            loss, decoded, _ = compiled(x, labels, t)
            torch.testing.assert_close(loss, make(OTHER, -7).loss(x, x.flip(3), labels, t), rtol=1e-6, atol=0)
            assert torch.equal(decoded, fk.nearest_centroid(x, OTHER))
            model.load_state_dict(make().state_dict())


def test_an_exported_program_contains_only_the_codes(tmp_path):
    exported = torch.export.export(make().decode, (points(),))
    assert {v.shape for v in exported.state_dict.values()} == {(40, 3), ()}
    file = io.BytesIO()
    torch.export.save(exported, file)
    file.seek(0)
    program = torch.export.load(file).module()
    program.load_state_dict(make(OTHER, -7).decode.state_dict())
    assert torch.equal(program(points()), fk.nearest_centroid(points(), OTHER))


def test_values_on_other_devices_are_read_once_per_version():
    """CPU tensors stand for GPU tensors: there is one read after each write, and no other read."""
    from flowseg_kernels import derived

    reads = []

    def read(tensor):
        reads.append(tensor)
        return tensor.sum().item()

    codes = torch.zeros(4, 3)
    for _ in range(3):
        assert derived._once_per_version(codes, read) == 0
    assert len(reads) == 1
    codes[0, 0] = 5
    assert derived._once_per_version(codes, read) == derived._once_per_version(codes, read) == 5
    assert len(reads) == 2
    # A new tensor is never confused with an earlier one whose memory was freed.
    for value in range(100):
        fresh = torch.full((4, 3), float(value))
        assert derived._once_per_version(fresh, read) == 12 * value
        del fresh
    assert len(derived._on_devices) <= derived._KEPT_ON_DEVICES


def run_rank(rank, meeting):
    """Rank 1 starts with other codes and another label; the broadcasts of DDP and FSDP give it those of rank 0."""
    from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision, StateDictType

    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    own = make() if rank == 0 else make(OTHER, -7)
    model = torch.nn.Sequential(own.net, own.decode)
    model.forward = lambda x: own.decode(x) + 0 * own.net(x).sum().long()
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    wrapped(points())
    check(own, CODES)
    own = make(OTHER)
    model = torch.nn.Sequential(own.net, own.decode)
    model.forward = lambda x: own.decode(x) + 0 * own.net(x).sum().long()
    cast = MixedPrecision(buffer_dtype=torch.bfloat16)
    wrapped = FullyShardedDataParallel(model, mixed_precision=cast, device_id=torch.device("cpu"))
    wrapped(points())
    assert own.decode.codebook.centroids.dtype == torch.bfloat16
    assert torch.equal(own.decode(points()), fk.nearest_centroid(points(), OTHER))
    with FullyShardedDataParallel.state_dict_type(wrapped, StateDictType.FULL_STATE_DICT):
        (saved,) = (v for k, v in wrapped.state_dict().items() if k.endswith("centroids"))
    assert torch.equal(saved, OTHER)
    dist.destroy_process_group()


@needs_gloo
def test_processes_agree_on_the_codes(tmp_path):
    run_two(__name__, tmp_path)
