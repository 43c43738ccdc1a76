//! Parameters on the host: typed bytes, mapped from a file or owned.

use std::alloc::{Layout, handle_alloc_error};
use std::borrow::Cow;
use std::ops::Range;
use std::sync::{Arc, OnceLock};

use half::{bf16, f16};

use crate::pages::Pages;
use crate::random::Draw;

/// Element type of a stored parameter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Dtype {
    /// IEEE binary32.
    F32,
    /// IEEE binary16.
    F16,
    /// bfloat16, the upper half of binary32.
    Bf16,
}

impl Dtype {
    /// Bytes of one element.
    pub fn size(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
        }
    }
}

impl std::fmt::Display for Dtype {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
        })
    }
}

/// Whatever keeps parameter bytes alive: a mapped file, a vector.
pub(crate) trait Bytes: AsRef<[u8]> + Send + Sync {
    /// The range is not needed for now: what is mapped may leave this process' memory.
    fn release(&self, _: Range<usize>) {}
}

pub(crate) type Owner = Arc<dyn Bytes>;

/// Row-major elements of one tensor, stored or drawn at random. A clone shares the bytes.
///
/// ```
/// use jamba_core::{Dtype, HostTensor};
///
/// let tensor = HostTensor::from_halves(Dtype::Bf16, vec![1, 2], vec![0x3f80, 0xc000]);
/// assert_eq!(*tensor.to_f32(), [1.0, -2.0]);
/// ```
#[derive(Clone)]
pub struct HostTensor {
    dtype: Dtype,
    shape: Vec<usize>,
    elements: Elements,
}

#[derive(Clone)]
enum Elements {
    Stored(Owner, Range<usize>),
    /// All of them once somebody has asked for all.
    Drawn(Draw, Arc<OnceLock<Pages<u8>>>),
}

impl HostTensor {
    /// A view of `bytes` within `owner`. The caller has checked that they are there and as many
    /// as the shape needs.
    pub(crate) fn view(dtype: Dtype, shape: Vec<usize>, owner: Owner, bytes: Range<usize>) -> Self {
        debug_assert_eq!(shape.iter().product::<usize>() * dtype.size(), bytes.len());
        Self { dtype, shape, elements: Elements::Stored(owner, bytes) }
    }

    /// Elements that are drawn where they are read, so that they take no memory until
    /// [`bytes`](Self::bytes) asks for all of them.
    pub fn drawn(dtype: Dtype, shape: Vec<usize>, draw: Draw) -> Self {
        Self { dtype, shape, elements: Elements::Drawn(draw, Arc::default()) }
    }

    /// How the elements are drawn, unless they are stored: a backend may draw them itself, where it
    /// keeps them.
    pub fn draw(&self) -> Option<Draw> {
        match self.elements {
            Elements::Stored(..) => None,
            Elements::Drawn(draw, _) => Some(draw),
        }
    }

    /// Takes f32 values, row-major.
    ///
    /// # Panics
    /// If the shape does not have as many elements.
    pub fn from_f32(shape: Vec<usize>, values: Vec<f32>) -> Self {
        Self::own(Dtype::F32, shape, values)
    }

    /// Takes the bits of f16 or bf16 values, row-major.
    ///
    /// # Panics
    /// If the shape does not have as many elements, or the dtype is not of 16 bits.
    pub fn from_halves(dtype: Dtype, shape: Vec<usize>, bits: Vec<u16>) -> Self {
        Self::own(dtype, shape, bits)
    }

    fn own<T: bytemuck::Pod + Send + Sync>(
        dtype: Dtype,
        shape: Vec<usize>,
        values: Vec<T>,
    ) -> Self {
        struct Owned<T>(Vec<T>);
        impl<T: bytemuck::Pod> AsRef<[u8]> for Owned<T> {
            fn as_ref(&self) -> &[u8] {
                bytemuck::cast_slice(&self.0)
            }
        }
        impl<T: bytemuck::Pod + Send + Sync> Bytes for Owned<T> {}
        assert_eq!(shape.iter().product::<usize>(), values.len(), "shape {shape:?}");
        assert_eq!(size_of::<T>(), dtype.size(), "{dtype}");
        let bytes = 0..values.len() * dtype.size();
        Self { dtype, shape, elements: Elements::Stored(Arc::new(Owned(values)), bytes) }
    }

    /// Element type.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// Row-major shape.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// The elements as they are stored, little-endian.
    pub fn bytes(&self) -> &[u8] {
        match &self.elements {
            Elements::Stored(owner, bytes) => &(**owner).as_ref()[bytes.clone()],
            Elements::Drawn(draw, all) => all.get_or_init(|| {
                let bytes = self.len() * self.dtype.size();
                let layout = Layout::array::<u8>(bytes).unwrap_or(Layout::new::<u8>());
                // Without memory it ends as a vector does.
                let pages = Pages::zeros("random weights", bytes);
                let mut all = pages.unwrap_or_else(|_| handle_alloc_error(layout));
                self.draw_into(*draw, &mut all);
                all
            }),
        }
    }

    /// The bytes of some elements, without the others where they are drawn.
    ///
    /// # Panics
    /// If there are fewer elements.
    pub fn read(&self, elements: Range<usize>) -> Cow<'_, [u8]> {
        match &self.elements {
            Elements::Drawn(draw, all) if all.get().is_none() => {
                assert!(elements.end <= self.len(), "{elements:?} of {}", self.len());
                let mut bytes = vec![0; elements.len() * self.dtype.size()];
                self.draw_into(draw.skip(elements.start), &mut bytes);
                Cow::Owned(bytes)
            }
            _ => {
                let size = self.dtype.size();
                Cow::Borrowed(&self.bytes()[elements.start * size..elements.end * size])
            }
        }
    }

    /// Draws as many elements as fit.
    fn draw_into(&self, draw: Draw, to: &mut [u8]) {
        match self.dtype {
            Dtype::F32 => draw.fill(to.as_chunks_mut().0, f32::to_le_bytes),
            Dtype::F16 => draw.fill(to.as_chunks_mut().0, |v| f16::from_f32(v).to_le_bytes()),
            Dtype::Bf16 => draw.fill(to.as_chunks_mut().0, |v| bf16::from_f32(v).to_le_bytes()),
        }
    }

    /// Number of elements.
    fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// Tells that the elements were copied to where they are needed: what is mapped from a file
    /// need not stay in the memory of this process. They can still be read.
    pub fn release(&self) {
        if let Elements::Stored(owner, bytes) = &self.elements {
            owner.release(bytes.clone());
        }
    }

    /// The elements as f32: borrowed where they are stored so, converted otherwise.
    pub fn to_f32(&self) -> Cow<'_, [f32]> {
        let bytes = self.bytes();
        match self.dtype {
            Dtype::F32 => match bytemuck::try_cast_slice(bytes) {
                Ok(values) => Cow::Borrowed(values),
                Err(_) => bytes
                    .chunks_exact(4)
                    .map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))
                    .collect(),
            },
            Dtype::F16 => halves(bytes, |bits| f16::from_bits(bits).to_f32()),
            Dtype::Bf16 => halves(bytes, |bits| bf16::from_bits(bits).to_f32()),
        }
    }

    /// The elements from number `start` on as f32, as many as fit.
    ///
    /// # Panics
    /// If there are fewer.
    pub fn read_f32(&self, start: usize, to: &mut [f32]) {
        let bytes = &*self.read(start..start + to.len());
        let halves = bytes.as_chunks().0.iter().map(|b| u16::from_le_bytes(*b));
        match self.dtype {
            Dtype::F32 => {
                let values = bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b));
                to.iter_mut().zip(values).for_each(|(to, v)| *to = v);
            }
            Dtype::F16 => {
                to.iter_mut().zip(halves).for_each(|(to, b)| *to = f16::from_bits(b).to_f32());
            }
            // Without the look at NaN of `to_f32`, whose bits may change: a loop of vectors.
            Dtype::Bf16 => {
                to.iter_mut()
                    .zip(halves)
                    .for_each(|(to, b)| *to = f32::from_bits(u32::from(b) << 16));
            }
        }
    }
}

fn halves(bytes: &[u8], widen: impl Fn(u16) -> f32) -> Cow<'static, [f32]> {
    bytes.chunks_exact(2).map(|b| widen(u16::from_le_bytes([b[0], b[1]]))).collect()
}

impl std::fmt::Debug for HostTensor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "HostTensor({} {:?})", self.dtype, self.shape)
    }
}

/// What a parameter is for, hence what a backend may do with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Role {
    /// The token embedding table; also the output head where they are tied.
    Embedding,
    /// The output head.
    Head,
    /// A matrix of [`Backend::linear`](crate::Backend::linear).
    Linear,
    /// `x_proj` or `dt_proj`: what makes dt, B and C of x (the selection of arXiv 2312.00752).
    /// Matrices of `linear` too, but small, and dt stands in an exponent.
    Selection,
    /// The router's matrix.
    Router,
    /// Matrices of the experts, stacked.
    Experts,
    /// A matrix of a dense MLP.
    Mlp,
    /// A vector: norm weights, biases, D. Small, and f32 in every backend.
    Vector,
    /// Taps of the convolution, `(d_inner, d_conv)`. Small, and f32 in every backend.
    Conv,
    /// `-exp(A_log)`, `(d_inner, d_state)`. Small, and f32 in every backend.
    A,
}

/// One parameter on its way to a backend: some stored tensors laid one below the other.
///
/// Stacking is left to the backend, so that one that can work on several pieces (`q_proj`,
/// `k_proj` and `v_proj`, or the experts one by one) need not copy them.
#[derive(Clone, Debug)]
pub struct Param {
    /// Name for error messages, in the checkpoint's terms.
    pub name: String,
    /// What it is for.
    pub role: Role,
    /// Row-major shape of the whole.
    pub shape: Vec<usize>,
    /// The pieces, in order; each has the last dimension of `shape`, and their elements together
    /// are the elements of `shape`.
    pub parts: Vec<HostTensor>,
}

impl Param {
    /// A parameter of one piece.
    pub fn new(name: impl Into<String>, role: Role, tensor: HostTensor) -> Self {
        Self { name: name.into(), role, shape: tensor.shape().to_vec(), parts: vec![tensor] }
    }

    /// All elements as f32.
    pub fn to_f32(&self) -> Vec<f32> {
        match self.parts.as_slice() {
            [one] => one.to_f32().into_owned(),
            parts => {
                let mut all = Vec::with_capacity(self.shape.iter().product());
                parts.iter().for_each(|part| all.extend_from_slice(&part.to_f32()));
                all
            }
        }
    }

    /// The shape as a matrix: all dimensions but the last are rows; a vector is one row.
    pub fn matrix_shape(&self) -> [usize; 2] {
        match self.shape.split_last() {
            Some((&cols, rows)) => [rows.iter().product(), cols],
            None => [1, 1],
        }
    }
}
