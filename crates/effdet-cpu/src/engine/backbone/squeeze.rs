//! Squeeze-and-excitation of a block.

use effdet_model::network::SqueezeExcite;

use super::Squeeze;
use crate::engine::gradients::Gradients;
use crate::engine::pass::Pass;
use crate::kernels::elementwise::Source;
use crate::kernels::se;
use crate::math::Act;
use crate::storage::Stored;

impl Squeeze {
    fn weights<'a>(&self, pass: &Pass<'a>) -> se::Weights<'a> {
        let SqueezeExcite { reduce, expand } = &self.layer;
        se::Weights {
            reduce_kernel: pass.variable(reduce.kernel),
            reduce_bias: pass.bias(reduce),
            expand_kernel: pass.variable(expand.kernel),
            expand_bias: pass.bias(expand),
        }
    }

    pub(super) fn forward<X: Stored>(
        &mut self,
        pass: &Pass<'_>,
        act: Act,
        images: usize,
        rows_per_image: usize,
        source: Source<'_, X>,
    ) {
        let weights = self.weights(pass);
        let channels = self.layer.expand.out_channels;
        let pool = se::Pool {
            images,
            rows_per_image,
            channels,
            source,
            mean: &mut self.mean,
        };
        se::pool(pass.executor, pool);
        let excite = se::Excite {
            weights,
            act,
            mean: &self.mean,
            hidden: &mut self.hidden,
            gate: &mut self.gate,
        };
        se::excite(pass.executor, excite);
    }

    /// Gradients of the four weight tensors and, into `dpool`, dpool/N.
    pub(super) fn backward(
        &self,
        pass: &Pass<'_>,
        act: Act,
        rows_per_image: usize,
        sums: &[f64],
        dpool: &mut [f32],
        gradients: &mut Gradients<'_>,
    ) {
        let SqueezeExcite { reduce, expand } = &self.layer;
        let [reduce_kernel, reduce_bias, expand_kernel, expand_bias] =
            gradients.of_all([Some(reduce.kernel), reduce.bias, Some(expand.kernel), expand.bias]);
        let args = se::Backward {
            weights: self.weights(pass),
            act,
            rows_per_image,
            mean: &self.mean,
            hidden: &self.hidden,
            gate: &self.gate,
            sums,
            dpool,
            weight_gradients: se::WeightGradients {
                reduce_kernel,
                reduce_bias,
                expand_kernel,
                expand_bias,
            },
        };
        se::backward(pass.executor, args);
    }
}
