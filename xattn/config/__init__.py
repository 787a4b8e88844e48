"""From typed overrides to a frozen, validated :class:`Config`, and from that to the name of the run's folder.

Only this package, :mod:`xattn.app` and the Hydra plugins know Hydra and omegaconf. It imports no jax.
"""

from xattn.config.composition import (
    amend as amend,
    compose as compose,
    compose_in_folder as compose_in_folder,
    from_hydra as from_hydra,
    load as load,
    register_resolvers as register_resolvers,
    save as save,
    section as section,
    sized as sized,
    to_yaml as to_yaml,
)
from xattn.config.groups import check_folders as check_folders, choices_in as choices_in
from xattn.config.messages import COMPOSITION_ERRORS as COMPOSITION_ERRORS, explain as explain, nearest_of as nearest_of
from xattn.config.naming import (
    differences as differences,
    folder_of as folder_of,
    hashed_values as hashed_values,
    older_folder as older_folder,
    pack_key as pack_key,
    program_key as program_key,
    run_hash as run_hash,
    run_name as run_name,
    shaping as shaping,
    untracked as untracked,
    varying_keys as varying_keys,
)
from xattn.config.renamed import arguments_under_new_names as arguments_under_new_names
from xattn.config.schema import Config as Config, config_type as config_type, registered_choices as registered_choices
from xattn.section import CONF as CONF
